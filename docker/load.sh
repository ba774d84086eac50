#!/bin/sh
# What a container of the load image does:
#   master [locust options]   Locust's web page, or a headless run with --headless
#   worker [locust options]   one load worker
#   anything else             a tritonmark command, such as `history` or `report /results`
set -eu
role=$1
shift
package=$(python3 -c 'import loadgen; print(loadgen.__path__[0])')
case "${MODEL:-}" in
    cogvideox*) file=$package/video.py ;;
    *) file=$package/llm.py ;;
esac

# Who may reach the web page can send load anywhere, so it needs a login when it is not on loopback.
login() {
    if [ -n "${LOCUST_PASSWORD:-}" ]; then
        file="$file,/opt/docker/web_login.py"
        web="--web-login"
    elif [ "${BIND:-127.0.0.1}" != 127.0.0.1 ] && [ "${BIND:-}" != "::1" ]; then
        echo "error: BIND is $BIND, so Locust's page is open to others; set LOCUST_PASSWORD in .env" >&2
        exit 2
    fi
}

# Containers do not see the server's hardware over HTTP: the label comes from its DCGM exporter, or, where no GPU is in
# play, from this host.
label() {
    [ -n "${DCGM_URL:-}" ] || ! getent hosts dcgm >/dev/null || DCGM_URL=http://dcgm:9400
    [ -n "${HARDWARE:-}" ] ||
        HARDWARE=$(tritonmark hosts label ${DCGM_URL:+--dcgm "$DCGM_URL"} --triton "$TRITON_URL") || exit 2
    echo "hardware label: $HARDWARE"
}

all_ready() {
    for url in $(echo "$TRITON_URL" | tr , ' '); do
        python3 /opt/docker/healthcheck.py "$url/v2/health/ready" 2>/dev/null || return 1
    done
}

await_server() {
    waited=0
    until all_ready; do
        if [ "$waited" -ge "${SERVER_WAIT_S:-1800}" ]; then
            echo "error: $TRITON_URL is not ready after $waited s; see the server's log, or raise SERVER_WAIT_S" >&2
            exit 2
        fi
        sleep 2
        waited=$((waited + 2))
    done
}

case "$role" in
    master)
        web=
        login
        await_server
        label
        # shellcheck disable=SC2086  # web is an option or nothing
        exec locust -f "$file" --master --host "$TRITON_URL" --model "$MODEL" --hardware "$HARDWARE" \
            --results /results --metrics-bind "${METRICS_BIND:-0.0.0.0}" $web "$@"
        ;;
    worker)
        exec locust -f "$file" --worker --master-host "${MASTER_HOST:-locust-master}" \
            --metrics-bind "${METRICS_BIND:-0.0.0.0}" "$@"
        ;;
    *) exec tritonmark "$role" "$@" ;;
esac
