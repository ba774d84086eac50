"""A library with its own asyncio batch loop behind an engine process (llm_link.py). Runs inside that process; imports
nothing of this project.

The library batches; this file hands requests in and token ids out, all on one event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from llm_request import Output, Prompt

WARM_UP = ((8, 4), (128, 4), (512, 4))  # (prompt tokens, new tokens): the first real request must not pay for these
LOOK_S = 0.25
GIVEN_UP = ("abort", "error", "cancelled", "timeout")  # finish reasons of requests that failed in the library
Made = tuple[list[int], bool, str | None]  # new token ids, whether they are the last, and then why


class AsyncEngine:
    """`deliver(outputs, occupancy)` is called on the event loop with all that one turn of it made; `submit`, `cancel`
    and `stop` may be called from any thread. A subclass says how to start, generate, look and end."""

    def __init__(
        self, folder: Path, settings: dict, device: str, deliver: Callable, tell: Callable[[str], None]
    ) -> None:
        self.end_ids = list(settings["end_token_ids"])
        self.occupancy = (0, 0, 0.0)
        self._deliver = deliver
        self._tasks: dict[str, asyncio.Task] = {}
        self._made: dict[str, Output] = {}
        self._ended = threading.Event()
        self._loop = asyncio.new_event_loop()
        arguments = dict(settings["engine_arguments"])
        arguments["model"] = arguments["model"] or str(folder)
        tell(f"starting with {arguments}")
        self._loop.run_until_complete(self.start(arguments))
        tell("warming up")
        self._loop.run_until_complete(self._warm_up(settings["max_context"]))

    async def start(self, arguments: dict[str, Any]) -> None:
        """Make the library's engine."""
        raise NotImplementedError

    def generate(self, request_id: str, ids: list[int], prompt: Prompt) -> AsyncIterator[Made]:
        """What is made, as it comes. Closing or cancelling it aborts the request."""
        raise NotImplementedError

    def failure(self) -> BaseException | None:
        """Why the library's engine is dead, or None while it lives."""
        raise NotImplementedError

    def shut_down(self) -> None:
        """End the library's engine and its processes."""
        raise NotImplementedError

    async def _warm_up(self, max_context: int) -> None:
        for tokens, new in WARM_UP:
            if tokens + new < max_context:
                prompt = Prompt(
                    text="", max_tokens=new, min_tokens=0, ignore_eos=True, temperature=0.0, top_k=0, top_p=1.0,
                    seed=None, stream=True, return_token_ids=False,
                )  # fmt: skip
                async for _ in self.generate(f"warm-up-{tokens}", [1] * tokens, prompt):
                    pass

    def submit(self, request_id: str, ids: list[int], prompt: Prompt) -> None:
        """Start a request; its tokens come through `deliver`."""
        self._loop.call_soon_threadsafe(self._begin, request_id, ids, prompt)

    def cancel(self, request_id: str) -> None:
        """Take a request out of the batch; it yields nothing more."""
        self._loop.call_soon_threadsafe(self._drop, request_id)

    def stop(self) -> None:
        """End `run`."""
        self._ended.set()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def run(self) -> None:
        """Serve until `stop`; raises when the library's engine has died."""
        watch = self._loop.create_task(self._watch())
        try:
            if not self._ended.is_set():
                self._loop.run_forever()
            if watch.done() and (error := watch.exception()):
                raise error
        finally:
            self.shut_down()

    def _begin(self, request_id: str, ids: list[int], prompt: Prompt) -> None:
        self._tasks[request_id] = self._loop.create_task(self._serve(request_id, ids, prompt))

    def _drop(self, request_id: str) -> None:
        task = self._tasks.pop(request_id, None)
        if task is not None:
            task.cancel()

    async def _serve(self, request_id: str, ids: list[int], prompt: Prompt) -> None:
        try:
            async for tokens, finished, reason in self.generate(request_id, ids, prompt):
                error = f"the engine gave the request up: {reason}" if finished and reason in GIVEN_UP else None
                self._add(request_id, tokens, finished, error)
        except asyncio.CancelledError:
            pass  # nobody waits for it any more
        except Exception as error:
            self._add(request_id, [], True, f"{type(error).__name__}: {error}")
        finally:
            self._tasks.pop(request_id, None)

    def _add(self, request_id: str, tokens: list[int], finished: bool, error: str | None = None) -> None:
        """Collect what this turn of the event loop makes, so that one step is one message to each instance."""
        if not self._made:
            self._loop.call_soon(self._flush)
        known = self._made.get(request_id)
        if known is None:
            self._made[request_id] = Output(request_id, list(tokens), finished, error)
        else:
            known.add(tokens, finished, error)

    def _flush(self) -> None:
        made, self._made = self._made, {}
        self._deliver(list(made.values()), self.occupancy)

    async def _watch(self) -> None:
        """Publish the gauges while nothing is made, and end the process when the engine has died."""
        while True:
            await asyncio.sleep(LOOK_S)
            if error := self.failure():
                self._loop.stop()
                raise error
            self._deliver([], self.occupancy)
