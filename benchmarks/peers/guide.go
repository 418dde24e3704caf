// Peer (d): the service of the metrics guide, in Go: net/http, database/sql with lib/pq,
// client_golang, and a pool of at most 25 connections that keeps 5 idle.
package main

import (
	"database/sql"
	"encoding/json"
	"log"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const insert = `INSERT INTO users (email, email_folded, first_name, last_name) VALUES ($1, lower($1), $2, $3)
RETURNING id, email, first_name, last_name, created_at, updated_at`

var (
	email     = regexp.MustCompile(`^[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}$`)
	durations = promauto.NewHistogramVec(prometheus.HistogramOpts{
		Name: "signup_request_duration_seconds", Help: "Duration of signup requests in seconds",
	}, []string{"status_code"})
	requests = promauto.NewCounterVec(prometheus.CounterOpts{
		Name: "signup_requests_total", Help: "Signup requests answered",
	}, []string{"status_code"})
	failures = promauto.NewCounterVec(prometheus.CounterOpts{
		Name: "signup_errors_total", Help: "Signup requests answered with an error, by cause",
	}, []string{"error_type"})
	queries = promauto.NewHistogramVec(prometheus.HistogramOpts{
		Name: "database_query_duration_seconds", Help: "Duration of database queries in seconds",
	}, []string{"operation"})
	connections = promauto.NewGaugeVec(prometheus.GaugeOpts{
		Name: "database_connections", Help: "Database connections of the pool by state",
	}, []string{"state"})
)

type user struct {
	ID        int64     `json:"id"`
	Email     string    `json:"email"`
	FirstName string    `json:"first_name"`
	LastName  string    `json:"last_name"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
}

func respond(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(body)
}

// signup handles one request; cause is empty for a 201.
func signup(db *sql.DB, r *http.Request) (status int, cause, text string, created user) {
	if r.Method != http.MethodPost {
		return http.StatusMethodNotAllowed, "invalid_method", "method not allowed", created
	}
	if json.NewDecoder(r.Body).Decode(&created) != nil {
		return http.StatusBadRequest, "invalid_json", "invalid request body", created
	}
	for _, field := range []*string{&created.Email, &created.FirstName, &created.LastName} {
		*field = strings.TrimSpace(*field)
		if *field == "" || len(*field) > 254 {
			return http.StatusBadRequest, "validation", "a field is missing or too long", created
		}
	}
	if !email.MatchString(created.Email) {
		return http.StatusBadRequest, "validation", "email is not valid", created
	}
	started := time.Now()
	err := db.QueryRow(insert, created.Email, created.FirstName, created.LastName).Scan(
		&created.ID, &created.Email, &created.FirstName, &created.LastName,
		&created.CreatedAt, &created.UpdatedAt)
	queries.WithLabelValues("insert_user").Observe(time.Since(started).Seconds())
	if e, ok := err.(*pq.Error); ok && e.Code.Name() == "unique_violation" {
		return http.StatusConflict, "duplicate_email", "email already exists", created
	} else if err != nil {
		return http.StatusInternalServerError, "database", "failed to create user", created
	}
	return http.StatusCreated, "", "", created
}

func main() {
	db, err := sql.Open("postgres", os.Getenv("DATABASE_URL")+"&sslmode=disable")
	if err != nil {
		log.Fatal(err)
	}
	db.SetMaxOpenConns(25)
	db.SetMaxIdleConns(5)
	go func() {
		for range time.Tick(15 * time.Second) {
			stats := db.Stats()
			connections.WithLabelValues("in_use").Set(float64(stats.InUse))
			connections.WithLabelValues("idle").Set(float64(stats.Idle))
			connections.WithLabelValues("open").Set(float64(stats.OpenConnections))
		}
	}()
	http.Handle("/metrics", promhttp.Handler())
	http.HandleFunc("/signup", func(w http.ResponseWriter, r *http.Request) {
		started := time.Now()
		status, cause, text, created := signup(db, r)
		if cause == "" {
			respond(w, status, map[string]any{
				"message": "user created successfully", "user": created})
		} else {
			respond(w, status, map[string]string{"error": text})
			failures.WithLabelValues(cause).Inc()
		}
		durations.WithLabelValues(strconv.Itoa(status)).Observe(time.Since(started).Seconds())
		requests.WithLabelValues(strconv.Itoa(status)).Inc()
	})
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], nil))
}
