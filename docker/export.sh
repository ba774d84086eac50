#!/bin/sh
# Builds the model repository into /models once. A second start with the same settings does nothing.
set -eu
asked="$MODEL --backend $BACKEND --weights $WEIGHTS${EXPORT_ARGS:+ $EXPORT_ARGS}"
stamp="/models/.exported-$MODEL"
if [ -f "/models/$MODEL/config.pbtxt" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$asked" ]; then
    echo "already exported: $asked"
    exit 0
fi
rm -f "$stamp"
# shellcheck disable=SC2086  # EXPORT_ARGS is a list of words
tritonmark export "$MODEL" --backend "$BACKEND" --weights "$WEIGHTS" --out /models --force ${EXPORT_ARGS:-}
printf '%s\n' "$asked" > "$stamp"
