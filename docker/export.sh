#!/bin/sh
# Builds the model repository into /models once. A second start with the same settings does nothing.
set -eu
launch="/models/$MODEL/1/launch.json"
if [ "$BACKEND" = tensorrtllm ]; then # its engines are built by `docker run`, which is not to be had in a container
    if [ -f "$launch" ]; then
        echo "made on the host, used as it is: $MODEL"
        exit 0
    fi
    echo "error: no engine of $MODEL in MODEL_REPOSITORY; build it on the host, into that folder:" \
        "tritonmark export $MODEL --backend tensorrtllm --out model_repository" >&2
    exit 2
elif [ -f "$launch" ]; then
    echo "error: $MODEL in MODEL_REPOSITORY is an engine of TensorRT-LLM, made on the host; set BACKEND=tensorrtllm," \
        "or remove it to export $BACKEND in its place" >&2
    exit 2
fi
if [ "$BACKEND" = tensorrt ]; then # torch-tensorrt is in none of the images, and the served container is read-only
    echo "error: BACKEND=tensorrt has no image here; use torch-compile, or export and serve it on the host" \
        "(docs/video.md)" >&2
    exit 2
fi
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
