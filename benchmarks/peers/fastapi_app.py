"""Peer (b): FastAPI, asyncpg and prometheus-fastapi-instrumentator.

It runs under uvicorn with 2 workers, uvloop, httptools and no access log.
"""

import contextlib
import os
from datetime import datetime

import asyncpg
from fastapi import FastAPI, HTTPException, Request
from prometheus_fastapi_instrumentator import Instrumentator
from pydantic import BaseModel, EmailStr

INSERT = """
INSERT INTO users (email, email_folded, first_name, last_name) VALUES ($1, $2, $3, $4)
RETURNING id, email, first_name, last_name, created_at, updated_at
"""


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI):
    url = os.environ["DATABASE_URL"]
    async with asyncpg.create_pool(url, min_size=12, max_size=12) as app.state.pool:
        yield


app = FastAPI(lifespan=lifespan)
Instrumentator().instrument(app).expose(app)


class Signup(BaseModel):
    email: EmailStr
    first_name: str
    last_name: str


class User(Signup):
    id: int
    created_at: datetime
    updated_at: datetime


class Created(BaseModel):
    message: str
    user: User


@app.post("/signup", status_code=201)
async def signup(body: Signup, request: Request) -> Created:
    try:
        row = await request.app.state.pool.fetchrow(
            INSERT, body.email, body.email.casefold(), body.first_name, body.last_name
        )
    except asyncpg.UniqueViolationError as error:
        raise HTTPException(409, "email already exists") from error
    return Created(message="user created successfully", user=User(**row))
