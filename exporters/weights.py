"""Weights and tokenizer of a language model, written as transformers does. The only file that touches the hub.

Three kinds: `hub` (the pinned revision), a local folder, `synthetic` (the exact architecture, seeded random values). A
synthetic export also trains its tokenizer, on `data/corpus.txt`, so nothing at all is downloaded. Files of real weights
are linked or copied as they are, never loaded: the runtime converts while it reads them, one parameter at a time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exporters.catalogue import Model, check_parameters
from exporters.errors import UserError

CORPUS = Path(__file__).with_name("data") / "corpus.txt"
TOKENIZER_SIZE = 2048  # ids, of which 256 are bytes and one is the end token
END_TOKEN = "<|endoftext|>"
HUB_ARCHITECTURES = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}  # class of transformers -> name in the hub's config.json
HUB, SYNTHETIC = "hub", "synthetic"
READABLE = 0o644  # mode of a served file; an export sets it, which must not reach the user's own files
GB = 1e9


@dataclass(frozen=True)
class Written:
    """What a weights folder holds: where it came from, ids of the end tokens, ids that the tokenizer can spell."""

    source: dict
    end_token_ids: list[int]
    decodable_tokens: int
    draw_on_load: bool = False  # no weights on disk; the runtime draws them from the seed


def train_tokenizer(folder: Path) -> int:
    """Train a byte-level BPE on the corpus and save it; returns the number of ids. Id 0 is the end token."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # sorted: equal exports have equal hashes
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE, special_tokens=[END_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS.read_text(encoding="utf-8")], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN, bos_token=END_TOKEN)
    wrapped.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def write_synthetic(model: Model, precision: str, seed: int, folder: Path) -> Written:
    """Config, tokenizer and, for a small model, the drawn weights as safetensors."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with import_path(Path(__file__).with_name("runtime")):
        from llm_weights import DTYPES, draw_weights
    check_parameters(model)
    decodable = train_tokenizer(folder)
    config = getattr(transformers, model.config_class)(**model.config)
    config.architectures = [model.model_class]
    config.dtype = DTYPES[precision]
    end_ids = [0]
    config.bos_token_id = config.eos_token_id = end_ids[0]
    if model.synthetic_on_disk:
        network = getattr(transformers, model.model_class)(config)
        draw_weights(network, seed, decodable)
        network.to(DTYPES[precision]).save_pretrained(folder)
        del network
    else:
        config.save_pretrained(folder)
    transformers.GenerationConfig(do_sample=False, eos_token_id=end_ids).save_pretrained(folder)
    source = {"kind": SYNTHETIC, "seed": seed, "torch": torch.__version__, "tokenizer": CORPUS.name}
    return Written(source, end_ids, decodable, draw_on_load=not model.synthetic_on_disk)


def write_pretrained(model: Model, precision: str, weights: str, folder: Path) -> Written:
    """Weights from the hub's pinned revision or from the local folder `weights`.

    Safetensors files are taken as they are, whatever their type; only where there are none, or under other names than
    transformers', is the model loaded and saved anew, which needs memory for all of it.
    """
    import transformers
    from safetensors import SafetensorError

    with import_path(Path(__file__).with_name("runtime")):
        from llm_weights import DTYPES
    where, options, source = _locate(model, weights)
    try:
        config, tokenizer = _describe(model, where, options)
        files = _weight_files(model, config, where, options, weights, folder)
        if files:
            _place(files, folder)
        else:
            _require_space(folder, model.parameters * DTYPES[precision].itemsize, f"{model.name} in {precision}")
            network = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[precision], **options)
            network.save_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(_reason(model, where, weights, error)) from None
    config.architectures = [model.model_class]
    config.dtype = DTYPES[precision]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{where} has no fast tokenizer (tokenizer.json); add one to the folder with transformers")
    end_ids = _end_ids(config, tokenizer, where, options)
    transformers.GenerationConfig(do_sample=False, eos_token_id=end_ids).save_pretrained(folder)
    return Written(source, end_ids, len(tokenizer))


def _describe(model: Model, where: str, options: dict) -> tuple:
    """Configuration and tokenizer of `where`. A UserError where it holds another architecture."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(where, **options)
    if type(config).__name__ != model.config_class:
        raise UserError(f"{where} holds a {type(config).__name__}, but {model.name} needs a {model.config_class}")
    return config, transformers.AutoTokenizer.from_pretrained(where, **options)


def _end_ids(config, tokenizer, where: str, options: dict) -> list[int]:
    """The tokens that end an answer: of generation_config.json, else config.json, else the tokenizer."""
    import transformers

    end_ids = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    with contextlib.suppress(OSError):  # a model may have no generation_config.json
        generation = transformers.GenerationConfig.from_pretrained(where, **options)
        end_ids = generation.eos_token_id if generation.eos_token_id is not None else end_ids
    return [end_ids] if isinstance(end_ids, int) else list(end_ids or [])


def _weight_files(model: Model, config, where: str, options: dict, weights: str, folder: Path) -> list[Path]:
    """Safetensors and their index that the runtime can read; empty where they have to be made."""
    import torch
    import transformers

    with import_path(Path(__file__).with_name("runtime")):
        from llm_weights import Checkpoint
    path = Path(where)
    if weights == HUB:
        from huggingface_hub import constants, snapshot_download

        cache = Path(constants.HF_HUB_CACHE)
        there = sum(blob.stat().st_size for blob in cache.glob(f"models--{where.replace('/', '--')}/blobs/*"))
        _require_space(cache, model.parameters * 2 - there, f"{where} in the hub's cache")  # the hub has 16 bit
        found = snapshot_download(where, **options, allow_patterns=["*.safetensors", "model.safetensors.index.json"])
        path = Path(found)
    files = [*path.glob("*.safetensors"), *path.glob("model.safetensors.index.json")]
    if not ({"model.safetensors", "model.safetensors.index.json"} & {file.name for file in files}):
        return []
    with torch.device("meta"):
        network = getattr(transformers, model.model_class)(config)
    checkpoint = Checkpoint(path)
    readable = all(checkpoint.holds(name) for name, _ in network.named_parameters())
    return files if readable else []


def _place(files: list[Path], folder: Path) -> None:
    """Link `files` into `folder`, or copy them where they cannot be linked (another disk, or not as readable)."""
    sources = [file.resolve() for file in files]
    device = folder.stat().st_dev
    linkable = [f.stat().st_dev == device and f.stat().st_mode & 0o777 == READABLE for f in sources]
    rest = sum(f.stat().st_size for f, links in zip(sources, linkable, strict=True) if not links)
    _require_space(folder, rest, "a copy of the weights")
    for file, source, links in zip(files, sources, linkable, strict=True):
        target = folder / file.name
        if links:
            with contextlib.suppress(OSError):  # e.g. hard links are forbidden for files of other users
                os.link(source, target)
                continue
        shutil.copyfile(source, target)


def _require_space(folder: Path, needed: float, what: str) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{what} needs {needed / GB:.1f} GB on disk, {existing} has {free / GB:.1f} GB free; free some, or choose"
            " another disk with --out (HF_HOME for the hub's cache)"
        )


def write_outline(model: Model, precision: str, weights: str, seed: int, folder: Path) -> Written:
    """Configuration and tokenizer without weights, for an engine that reads or draws the weights itself.

    A synthetic `config.json` has each value under its older name too, for engines with an older transformers.
    """
    import transformers

    with import_path(Path(__file__).with_name("runtime")):
        from llm_weights import DTYPES
    if weights == SYNTHETIC:
        decodable = train_tokenizer(folder)
        config = getattr(transformers, model.config_class)(**model.config)
        config.architectures = [HUB_ARCHITECTURES.get(model.model_class, model.model_class)]
        config.bos_token_id = config.eos_token_id = 0
        dtype = str(DTYPES.get(precision, DTYPES["bf16"])).removeprefix("torch.")
        entries = {**model.config, **config.to_dict(), "dtype": dtype, "torch_dtype": dtype}
        entries |= {"bos_token_id": 0, "eos_token_id": 0}
        (folder / "config.json").write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        transformers.GenerationConfig(do_sample=False, eos_token_id=[0]).save_pretrained(folder)
        about = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        about["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older versions know too
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        source = {"kind": SYNTHETIC, "seed": seed, "tokenizer": CORPUS.name}
        return Written(source, [0], decodable, draw_on_load=True)
    where, options, source = _locate(model, weights)
    try:
        config, tokenizer = _describe(model, where, options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_reason(model, where, weights, error)) from None
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Written(source, _end_ids(config, tokenizer, where, options), len(tokenizer))


def _locate(model: Model, weights: str) -> tuple[str, dict, dict]:
    """(what from_pretrained takes, its options, the manifest's source)."""
    if weights != HUB:
        path = Path(weights).expanduser()
        if not (path / "config.json").is_file():
            raise UserError(
                f"weights {weights!r}: no config.json there; pass 'hub', 'synthetic' or a folder of save_pretrained"
            )
        return str(path), {"local_files_only": True}, {"kind": "local", "folder": path.name}
    if not model.hub_id:
        raise UserError(f"{model.name} is not on the hub; export it with --weights synthetic")
    revision = model.revision or "main"
    return model.hub_id, {"revision": revision}, {"kind": HUB, "hub_id": model.hub_id, "revision": revision}


def _reason(model: Model, where: str, weights: str, error: Exception) -> str:
    """One line for what `from_pretrained` and the hub's client raise; transformers wraps the client's errors."""
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full: {first_line}; free some, or choose another --out (HF_HOME for the hub's cache)"
    if weights != HUB:
        return f"cannot load weights from {where}: {first_line}"
    chain = [error, error.__cause__, error.__context__]
    kinds, text = {type(link).__name__ for link in chain}, " ".join(map(str, chain)).lower()
    instead = "or use --weights synthetic, or a local folder"
    if "invalid" in text and "token" in text:
        advice = "the hub does not know the token in HF_TOKEN or of `hf auth login`; make a new one"
    elif model.gated and ("GatedRepoError" in kinds or "gated" in text or "401" in text or "403" in text):
        advice = f"it is gated: accept its licence at https://huggingface.co/{where}, then `hf auth login`"
    elif model.gated:
        advice = "it is also gated: accept its licence and log in with `hf auth login`"
    else:
        return f"cannot fetch {where} from the hub: {first_line}; {instead}"
    return f"cannot fetch {where} from the hub: {first_line} ({advice}); {instead}"


@contextlib.contextmanager
def import_path(folder: Path) -> Iterator[None]:
    """Import the runtime's modules the way Triton does: by their bare names, from their own folder."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
