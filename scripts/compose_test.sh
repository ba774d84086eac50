#!/usr/bin/env bash
# The `cpu` profile of docker-compose.yml for real: images, health, a Server run with two workers through Locust's
# composed web page, a sealed run on this host, Prometheus, history; then `down`, and nothing may be left.
#
#   sudo scripts/compose_test.sh
#
# Needs root, docker, docker-compose (1.29 or v2) and debootstrap; a Docker daemon is started if none answers, and
# stopped again. No image is pulled: the base comes from Debian by debootstrap, Prometheus from Debian's package.
# Grafana and DCGM's exporter are not in Debian, and are not started here.
#
#   BASE_IMAGE=...     use this base and skip debootstrap
#   SITE_CA=FILE       CA bundle of the base, by default this host's; SITE_PIP_CONF=FILE its pip.conf, by default this
#                      user's; SITE_WHEELS=DIR a folder of wheels that it names, by default PIP_FIND_LINKS
#   SERVICES="..."     what to start
#
# Ends with 77 where no container can be run at all.
set -euo pipefail
cd "$(dirname "$0")/.."
export COMPOSE_PROJECT_NAME=tritonmark-test COMPOSE_PROFILES=cpu DOCKER_BUILDKIT=1 COMPOSE_DOCKER_CLI_BUILD=1
SERVICES=${SERVICES:-export cpu-server locust-master locust-worker history prometheus}
LABEL=label=com.docker.compose.project=$COMPOSE_PROJECT_NAME
work=$(mktemp -d /tmp/tritonmark-compose.XXXXXX)
started= images=()

say() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }
fail() { printf 'FAILED: %s\n' "$1" >&2; exit 1; }
skip() { printf 'skipped: %s\n' "$1" >&2; exit 77; }
# Docker's own listeners only: other programs of this machine come and go.
sockets() { ss -Hltnp | awk '/"docker-proxy"/ {print $4}' | sort; }
compose() { if command -v docker-compose >/dev/null; then docker-compose "$@"; else docker compose "$@"; fi; }

cleanup() {
    code=$?
    trap - EXIT
    [ "$code" = 0 ] || { compose ps; compose logs --tail 40; } || true
    compose down --volumes --remove-orphans --timeout 30 >/dev/null 2>&1 || true
    [ ${#images[@]} = 0 ] || docker rmi "${images[@]}" >/dev/null 2>&1 || true
    if [ -n "$started" ]; then
        kill "$started"
        wait "$started" 2>/dev/null || true
    fi
    rm -rf "$work"
    exit "$code"
}
trap cleanup EXIT

for name in docker debootstrap ss; do command -v $name >/dev/null || skip "$name is not installed"; done
client=$(docker version --format '{{.Client.Version}}' 2>/dev/null || true)
[ "${client%%.*}" -lt 23 ] || docker buildx version >/dev/null 2>&1 \
    || fail "this docker ($(command -v docker), $client) builds with buildx only; install it, or put Debian's docker first on PATH"
if ! docker info >/dev/null 2>&1; then
    say "start a Docker daemon"
    export DOCKER_HOST=unix://$work/docker.sock
    dockerd --data-root "$work/data" --exec-root "$work/exec" --pidfile "$work/docker.pid" --host "$DOCKER_HOST" \
        >"$work/dockerd.log" 2>&1 &
    started=$!
    for _ in $(seq 60); do docker info >/dev/null 2>&1 && break; sleep 1; done
    docker info >/dev/null || { tail "$work/dockerd.log"; skip "no Docker daemon can be started here"; }
fi

if [ -z "${BASE_IMAGE:-}" ]; then
    say "base image by debootstrap"
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,libpython3.11,ca-certificates \
        bookworm "$work/base" http://deb.debian.org/debian >"$work/debootstrap.log" \
        || { tail -3 "$work/debootstrap.log"; skip "debootstrap made no base image"; }
    for file in "${SITE_CA:-}" "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt; do
        [ -f "$file" ] && cp "$file" "$work/base/etc/ssl/certs/ca-certificates.crt" && break
    done
    for file in "${SITE_PIP_CONF:-}" "${PIP_CONFIG_FILE:-}" ~/.config/pip/pip.conf ~/.pip/pip.conf /etc/pip.conf; do
        [ -f "$file" ] && cp "$file" "$work/base/etc/pip.conf" && break
    done
    wheels=${SITE_WHEELS:-${PIP_FIND_LINKS:-}}
    [ ! -d "$wheels" ] || { mkdir -p "$work/base$(dirname "$wheels")" && cp -r "$wheels" "$work/base$wheels"; }
    BASE_IMAGE=$COMPOSE_PROJECT_NAME/base:local
    tar -C "$work/base" -c . | docker import --change 'ENV LANG=C.UTF-8' - "$BASE_IMAGE" >/dev/null
    images+=("$BASE_IMAGE")
    rm -rf "$work/base"
fi
docker run --rm "$BASE_IMAGE" true || skip "no container can be run here"

export LOAD_IMAGE=$COMPOSE_PROJECT_NAME/load:local CPU_SERVER_IMAGE=$COMPOSE_PROJECT_NAME/cpu-server:local
export PROMETHEUS_IMAGE=$COMPOSE_PROJECT_NAME/prometheus:local
for name in load cpu-server; do
    say "build $name"
    docker build --quiet --network host --build-arg BASE_IMAGE="$BASE_IMAGE" -f "docker/$name.Dockerfile" \
        -t "$COMPOSE_PROJECT_NAME/$name:local" .
done
say "build prometheus"
docker build --quiet --network host --build-arg BASE_IMAGE="$BASE_IMAGE" -t "$PROMETHEUS_IMAGE" - <<'EOF'
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus >/dev/null \
    && rm -rf /var/lib/apt/lists/* && install -d -o 65534 -g 65534 /prometheus
USER 65534:65534
ENTRYPOINT ["/usr/bin/prometheus"]
EOF
images=("$LOAD_IMAGE" "$CPU_SERVER_IMAGE" "$PROMETHEUS_IMAGE" "${images[@]}")
docker images --format '{{.Repository}}:{{.Tag}} {{.Size}}' | grep "^$COMPOSE_PROJECT_NAME/"

export RESULTS=$work/results RUN_UID=1234 RUN_GID=1234
NOFILE=$(ulimit -Hn)
[ "$NOFILE" != unlimited ] && [ "$NOFILE" -lt 65535 ] || NOFILE=65535
export NOFILE
mkdir "$RESULTS"
chown "$RUN_UID:$RUN_GID" "$RESULTS"
LOCUST_PASSWORD=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
export LOCUST_PASSWORD
sockets >"$work/before"

say "refused: exposed without a password"
refusal=$(BIND=0.0.0.0 LOCUST_PASSWORD='' compose run --rm --no-deps locust-master master 2>&1) && fail "it started"
grep -o 'error: BIND is 0.0.0.0.*' <<<"$refusal" || fail "the reason is missing: $refusal"

say "up: $SERVICES"
# shellcheck disable=SC2086  # a list of words
compose up -d --no-build --scale locust-worker=2 $SERVICES
for _ in $(seq 120); do
    ids=$(docker ps -q --filter "$LABEL")
    # shellcheck disable=SC2086
    states=$(docker inspect -f '{{.State.Health.Status}}' $ids | sort | uniq -c | tr -s ' \n' ' ')
    [[ $states == *starting* ]] || break
    ended=$(docker ps -a --filter "$LABEL" --filter status=exited --format '{{.Names}} {{.Status}}' | grep -v 'Exited (0)' || true)
    [ -z "$ended" ] || fail "ended: $ended"
    sleep 2
done
compose ps
[[ $states != *starting* && $states != *unhealthy* ]] || fail "not healthy: $states"
[ "$(docker ps -q --filter "$LABEL" --filter label=com.docker.compose.service=locust-worker | wc -l)" = 2 ] \
    || fail "there are not two workers"

say "hardening and sockets"
# shellcheck disable=SC2046
docker inspect -f '{{.Name}} user={{.Config.User}} read_only={{.HostConfig.ReadonlyRootfs}} drop={{.HostConfig.CapDrop}} {{.HostConfig.SecurityOpt}} privileged={{.HostConfig.Privileged}}' \
    $(docker ps -q --filter "$LABEL") | tee "$work/hardening"
grep -v 'read_only=true drop=\[ALL\] \[no-new-privileges:true\] privileged=false' "$work/hardening" && fail "a container is not hardened"
grep -E 'user=(0|root|)[: ]' "$work/hardening" && fail "a container runs as root"
sockets | comm -13 "$work/before" - | tee "$work/new"
[ -s "$work/new" ] || fail "no published port was seen"
grep -v '^127\.0\.0\.1:' "$work/new" && fail "a port is open to others"
docker exec "$(docker ps -q --filter "$LABEL" --filter label=com.docker.compose.service=cpu-server)" \
    sh -c 'touch /models/x' 2>/dev/null && fail "the server may write its model repository"

say "a Server run with two workers through the web page"
python3 scripts/compose_check.py "$RESULTS" "$SERVICES"

say "down"
# shellcheck disable=SC2046
docker inspect -f '{{.State.Pid}}' $(docker ps -q --filter "$LABEL") >"$work/pids"
compose down --volumes --remove-orphans --timeout 60
left=$(docker ps -aq --filter "$LABEL"; docker volume ls -q --filter "$LABEL"; docker network ls -q --filter "$LABEL")
[ -z "$left" ] || fail "left behind: $left"
while read -r pid; do [ ! -e "/proc/$pid" ] || fail "process $pid is left"; done <"$work/pids"
sockets | comm -13 "$work/before" - | { ! grep . || fail "a port is still open"; }
say "passed: no container, volume, network, process or port is left"
