"""GPUs that are not there: a metrics page under the names of DCGM's exporter and of Triton with GPUs.

For queries only: it shows that they parse, that their names and labels are those of NVIDIA's documents, and that units
are converted. No value of it was ever measured. It shares no code with the project.

    with GpuExporter(model="phi-2-tiny") as exporter:      # exporter.address is host:port

Two GPUs of 300 W and 200 W, 1980 MHz, 90 % busy, 6144 MiB in use, 66 °C; GPU 1 is throttled by heat half of the time.
The model has Triton's first-response histogram (2.52 or later): a response a second, each within 100 ms.
"""

import http.server
import threading
import time

GPUS = ({"watts": 300, "thermal": 0.0}, {"watts": 200, "thermal": 0.5})


def page(model, seconds):
    """The page `seconds` after the exporter started; counters grow with it."""
    lines = []

    def tell(name, kind, *samples):
        lines.append(f"# TYPE {name} {kind}")
        lines.extend(f"{name}{{{labels}}} {value}" for labels, value in samples)

    def dcgm(name, value, kind="gauge"):
        tell(name, kind, *((f'gpu="{k}",UUID="GPU-{k}",modelName="FAKE GPU",hostname="fake"', value(gpu))
                           for k, gpu in enumerate(GPUS)))  # fmt: skip

    def triton(name, value):
        tell(name, "gauge", *((f'gpu_uuid="GPU-{k}"', value(gpu)) for k, gpu in enumerate(GPUS)))

    dcgm("DCGM_FI_DEV_POWER_USAGE", lambda g: g["watts"])
    dcgm("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", lambda g: round(g["watts"] * seconds * 1000), "counter")
    dcgm("DCGM_FI_DEV_SM_CLOCK", lambda g: 1980)
    dcgm("DCGM_FI_DEV_MEM_CLOCK", lambda g: 2619)
    dcgm("DCGM_FI_DEV_GPU_TEMP", lambda g: 66)
    dcgm("DCGM_FI_DEV_FB_USED", lambda g: 6144)
    dcgm("DCGM_FI_DEV_GPU_UTIL", lambda g: 90)
    dcgm("DCGM_FI_PROF_SM_ACTIVE", lambda g: 0.8)
    dcgm("DCGM_FI_PROF_DRAM_ACTIVE", lambda g: 0.7)
    dcgm("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", lambda g: 0.3)
    dcgm("DCGM_FI_DEV_POWER_VIOLATION", lambda g: 0, "counter")
    dcgm("DCGM_FI_DEV_THERMAL_VIOLATION", lambda g: round(g["thermal"] * seconds * 1e9), "counter")
    dcgm("DCGM_FI_DEV_XID_ERRORS", lambda g: 0)
    triton("nv_gpu_power_usage", lambda g: g["watts"])
    triton("nv_gpu_power_limit", lambda g: 700)
    triton("nv_gpu_utilization", lambda g: 0.9)
    triton("nv_gpu_memory_used_bytes", lambda g: 6144 << 20)
    name, labels = "nv_inference_first_response_histogram_ms", f'model="{model}",version="1"'
    lines.append(f"# TYPE {name} histogram")
    lines.extend(f'{name}_bucket{{{labels},le="{le}"}} {int(seconds)}' for le in (100, 500, 2000, 5000, "+Inf"))
    lines.extend([f"{name}_sum{{{labels}}} {int(seconds) * 50}", f"{name}_count{{{labels}}} {int(seconds)}"])
    return "\n".join(lines) + "\n"


class GpuExporter:
    def __init__(self, model):
        began = time.monotonic()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                body = page(model, time.monotonic() - began).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
