"""Where real weights come from, the hub's pinned revision or a folder, and one line for what the hub refuses.

`HF_TOKEN`, `HF_HOME` and `HF_ENDPOINT` are the hub's own variables and do what they always do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporters.catalogue import Model
from exporters.disk import causes, is_full, require_space
from exporters.errors import UserError

HUB, SYNTHETIC = "hub", "synthetic"
WRONG_TOKEN = ("invalid credentials", "invalid user token")  # of hubs of today and of earlier days


def locate(model: Model, weights: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(what from_pretrained takes, its options, the manifest's source) of `weights` that are not synthetic."""
    if weights != HUB:
        path = Path(weights).expanduser()
        needed = [*(name for name, part in model.parts.items() if "parameters" in part), "tokenizer"]
        missing = [name for name in (needed if model.parts else ["config.json"]) if not (path / name).exists()]
        if missing:
            raise UserError(
                f"weights {weights!r}: no {missing[0]} there; pass 'hub', 'synthetic' or a folder of"
                f" {model.model_class}.save_pretrained"
            )
        return str(path), {"local_files_only": True}, {"kind": "local", "folder": path.name}
    if not model.hub_id:
        raise UserError(f"{model.name} is not on the hub; export it with --weights synthetic")
    revision = model.revision or "main"
    return model.hub_id, {"revision": revision}, {"kind": HUB, "hub_id": model.hub_id, "revision": revision}


@contextlib.contextmanager
def loading(model: Model, weights: str) -> Iterator[None]:
    """What goes wrong in the block, which loads `weights`, becomes one line; but a full disk, see exporters/export.py.

    One small file is fetched first, by the hub's own client: libraries on top of it wrap its errors into guesses.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError

    where, options, _ = locate(model, weights)
    try:
        if weights == HUB:
            hf_hub_download(where, "model_index.json" if model.parts else "config.json", **options)
        yield
    except (
        OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, *HfHubHTTPError.__bases__
    ) as error:  # fmt: skip
        if is_full(error):
            raise
        what = _refusal(model, error) if weights == HUB else f"cannot load weights from {where}: {_first_line(error)}"
        raise UserError(what) from None


def require_cache_space(model: Model) -> None:
    """A UserError where the hub's cache has no room for what is not in it yet of the model's weights."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = sum(blob.stat().st_size for blob in cache.glob(f"models--{model.hub_id.replace('/', '--')}/blobs/*"))
    needed = model.parameters * 2 - there  # the hub has 16 bit
    require_space(cache, needed, model.hub_id, f"the hub's cache {cache}", "set HF_HOME to a folder on another disk")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _refusal(model: Model, error: Exception) -> str:
    """What the hub said, and what to do about it, in one line."""
    from huggingface_hub import constants

    chain = list(causes(error))
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    text = " ".join(map(str, chain)).lower()
    status = next((link.response.status_code for link in chain if getattr(link, "response", None) is not None), 0)
    licence = f"accept its licence at https://huggingface.co/{model.hub_id} and set HF_TOKEN (or `hf auth login`)"
    if any(said in text for said in WRONG_TOKEN):
        why = "the hub does not know the token in HF_TOKEN or of `hf auth login`; set a new one"
        why += " from https://huggingface.co/settings/tokens"
    elif "GatedRepoError" in kinds:  # a kind of RepositoryNotFoundError
        why = f"it is gated: {licence}"
    elif "RepositoryNotFoundError" in kinds:
        why = "the hub has no such model, or hides it; if you may see it, set HF_TOKEN (or `hf auth login`)"
    elif "RevisionNotFoundError" in kinds:
        why = f"the hub has no revision {model.revision} of it; correct it in exporters/models.toml"
    elif status in (401, 403) and model.gated:
        why = f"the hub answered with {status}; it is gated: {licence}"
    elif status:
        why = f"the hub answered with {status}: {_first_line(error)}; try again later"
    elif "LocalEntryNotFoundError" in kinds or "HTTPError" in kinds:
        why = f"{constants.ENDPOINT} does not answer ({_first_line(chain[-1])}); check the network and HF_ENDPOINT"
        why += f"; it is also gated: {licence}" if model.gated else ""
    else:
        why = _first_line(error)
    return f"cannot fetch {model.hub_id} from the hub: {why}; or use --weights synthetic, or a local folder"
