"""What goes wrong in a served model reaches the one who has to know: errors of requests, of loading and of devices."""

import asyncio
import multiprocessing

import pytest


@pytest.fixture
def output(runtime):
    return runtime("llm_request").Output


def test_the_link_keeps_the_error_of_a_request_that_made_tokens_before(runtime, output):
    link = runtime("llm_link")
    engine = object.__new__(link.RemoteEngine)
    engine._link, other = multiprocessing.Pipe()
    for made in (output("r", [5], False), output("r", [], True, "CUDA out of memory"), output("s", [1], False)):
        other.send(([made], (1, 0, 0.5)))
    assert engine.results(1.0) == [output("r", [5], True, "CUDA out of memory"), output("s", [1], False)]


def test_a_library_that_gives_a_request_up_is_an_error(runtime, output):
    """vLLM and TensorRT-LLM say so in the finish reason only."""
    module, delivered = runtime("async_engine"), []

    class Library(module.AsyncEngine):
        async def generate(self, request_id, ids, prompt):
            yield [5], False, None
            yield [6], True, prompt

    async def serve(reason):
        engine = object.__new__(Library)
        engine._loop, engine._made, engine._tasks, engine.occupancy = asyncio.get_running_loop(), {}, {}, (0, 0, 0.0)
        engine._deliver = lambda outputs, occupancy: delivered.extend(outputs)
        await engine._serve("r", [1], reason)
        await asyncio.sleep(0)

    for reason in ("abort", "length", None):
        asyncio.run(serve(reason))
    assert delivered == [
        output("r", [5, 6], True, "the engine gave the request up: abort"),
        output("r", [5, 6], True),
        output("r", [5, 6], True),
    ]


def test_a_request_that_the_engine_cannot_take_fails_alone(runtime, output, tmp_path):
    link = runtime("llm_link")
    guests = link._Guests(tmp_path)

    class Engine:
        stop = cancel = lambda self, *_: None

        def submit(self, request_id, ids):
            if not ids:
                raise RuntimeError("no room")
            guests.deliver([output(request_id, ids, True)], (0, 0, 0.0))

    guests.serve(Engine())
    connection = link._join(tmp_path)
    answers = []
    for order in (("submit", "bad", []), ("submit", "good", [7])):
        connection.send(order)
        answers += connection.recv()[0]
    assert answers == [output("bad", [], True, "RuntimeError: no room"), output("good", [7], True)]
    connection.close()
