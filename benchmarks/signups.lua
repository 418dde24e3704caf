-- For wrk: signups with unique emails, and a line of JSON at the end, with times in seconds.
-- The only argument is the prefix of the emails, which must be new for each run.
local threads = 0

function setup(thread)
    thread:set("number", threads)
    threads = threads + 1
end

function init(args)
    prefix = string.format("%s-%d", args[1], number)
    count = 0
end

function request()
    count = count + 1
    local body = string.format(
        '{"email": "%s-%d@example.com", "first_name": "John", "last_name": "Doe"}', prefix, count)
    return wrk.format("POST", "/signup", {["Content-Type"] = "application/json"}, body)
end

function done(summary, latency)
    local errors = summary.errors
    io.write(string.format(
        '{"created": %d, "refused": %d, "unanswered": %d, "seconds": %f, "p50": %f, "p99": %f}\n',
        summary.requests - errors.status, errors.status,
        errors.connect + errors.read + errors.write + errors.timeout,
        summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end
