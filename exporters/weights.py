"""Weights and tokenizer of a language model, written as transformers does.

Three kinds: `hub` (the pinned revision), a local folder, `synthetic` (the exact architecture, seeded random values). A
synthetic export also trains its tokenizer, on `data/corpus.txt`, so nothing at all is downloaded. Files of real weights
are linked or copied as they are, never loaded: the runtime converts while it reads them, one parameter at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exporters.catalogue import Model, check_parameters, first_difference
from exporters.disk import require_space
from exporters.errors import UserError
from exporters.hub import HUB, SYNTHETIC, loading, locate, require_cache_space
from exporters.layout import import_path

CORPUS = Path(__file__).with_name("data") / "corpus.txt"
TOKENIZER_SIZE = 2048  # ids, of which 256 are bytes and one is the end token
END_TOKEN = "<|endoftext|>"
HUB_ARCHITECTURES = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}  # class of transformers -> name in the hub's config.json
# No part of what is computed: dropout, routing in training, and the end tokens, which the folder's tokenizer has.
UNCHECKED = ("attention_dropout", "resid_pdrop", "embd_pdrop", "router_jitter_noise", "input_jitter_noise",
             "router_aux_loss_coef", "bos_token_id", "eos_token_id")  # fmt: skip
ROPE_WARNINGS = ("Unrecognized keys in `rope_parameters`",
                 "has set a `rope_parameters['original_max_position_embeddings']` field")  # fmt: skip
READABLE = 0o644  # mode of a served file; an export sets it, which must not reach the user's own files


@dataclass(frozen=True)
class Written:
    """What a weights folder holds: where it came from, ids of the end tokens, ids that the tokenizer can spell."""

    source: dict
    end_token_ids: list[int]
    decodable_tokens: int
    draw_on_load: bool = False  # no weights on disk; the runtime draws them from the seed


def train_tokenizer(folder: Path, special: Mapping[str, str] | None = None, ends: bool = False) -> int:
    """Train a byte-level BPE on the corpus and save it; returns the number of ids. `special` are its special tokens by
    role, which get the first ids in their order (default: id 0 begins and ends); `ends` puts the end behind a text."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # sorted: equal exports have equal hashes
    special = special or {"eos_token": END_TOKEN, "bos_token": END_TOKEN}
    first = list(dict.fromkeys(special.values()))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS.read_text(encoding="utf-8")], trainer)
    if ends:
        end = special["eos_token"]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, first.index(end))]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def write_synthetic(model: Model, precision: str, seed: int, folder: Path) -> Written:
    """Config, tokenizer and, for a small model, the drawn weights as safetensors."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with import_path():
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

    with import_path():
        from llm_weights import DTYPES
    where, options, source = locate(model, weights)
    with loading(model, weights):
        config, tokenizer = _describe(model, where, options)
        files = _weight_files(model, config, where, options, weights)
        if files:
            _place(files, folder)
        else:
            require_space(folder, model.parameters * DTYPES[precision].itemsize, f"{model.name} in {precision}")
            _convert(model, where, options, DTYPES[precision], folder)
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
    """Configuration and tokenizer of `where`. A UserError where it holds another architecture than the catalogue's."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(where, **options)
    if type(config).__name__ != model.config_class:
        raise UserError(f"{where} holds a {type(config).__name__}, but {model.name} needs a {model.config_class}")
    # Both as the class completes them: configurations of other versions have other names and leave out defaults.
    needed = getattr(transformers, model.config_class)(**model.config)
    names = [*(name for name in model.config if name not in UNCHECKED), "rope_parameters"]
    needed = {name: getattr(needed, name) for name in names if hasattr(needed, name)}
    if different := first_difference(needed, {name: getattr(config, name, None) for name in needed}):
        raise UserError(f"{where} has {different} as {model.name} needs; export the model that these weights are of")
    check_parameters(model, config)
    return config, transformers.AutoTokenizer.from_pretrained(where, **options)


def _convert(model: Model, where: str, options: dict, dtype, folder: Path) -> None:
    """Load weights of another format and save them as safetensors; parameters that are missing are not made up."""
    import transformers

    network, found = transformers.AutoModelForCausalLM.from_pretrained(
        where, dtype=dtype, output_loading_info=True, **options
    )
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{where} has no {missing[0]}, so it is no whole {model.model_class}; take other weights")
    network.save_pretrained(folder)


def _end_ids(config, tokenizer, where: str, options: dict) -> list[int]:
    """The tokens that end an answer: of generation_config.json, else config.json, else the tokenizer."""
    import transformers

    end_ids = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    with contextlib.suppress(OSError):  # a model may have no generation_config.json
        generation = transformers.GenerationConfig.from_pretrained(where, **options)
        end_ids = generation.eos_token_id if generation.eos_token_id is not None else end_ids
    return [end_ids] if isinstance(end_ids, int) else list(end_ids or [])


def _weight_files(model: Model, config, where: str, options: dict, weights: str) -> list[Path]:
    """Safetensors and their index that the runtime can read; empty where they have to be made."""
    import torch
    import transformers

    with import_path():
        from llm_weights import Checkpoint
    path = Path(where)
    if weights == HUB:
        from huggingface_hub import snapshot_download

        require_cache_space(model)
        found = snapshot_download(where, **options, allow_patterns=["*.safetensors", "model.safetensors.index.json"])
        path = Path(found)
    files = [*path.glob("*.safetensors"), *path.glob("model.safetensors.index.json")]
    if not ({"model.safetensors", "model.safetensors.index.json"} & {file.name for file in files}):
        return []
    _require_shards(path)
    with torch.device("meta"):
        network = getattr(transformers, model.model_class)(config)
    checkpoint = Checkpoint(path)
    readable = all(checkpoint.holds(name) for name, _ in network.named_parameters())
    return files if readable else []


def _require_shards(path: Path) -> None:
    """A UserError where a file is missing that the index lists, as after a download that was broken off."""
    index = path / "model.safetensors.index.json"
    listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
    if missing := sorted(name for name in listed if not (path / name).is_file()):
        raise UserError(f"{path} has no {missing[0]}, which its {index.name} lists; fetch the weights again")


def _place(files: list[Path], folder: Path) -> None:
    """Link `files` into `folder`, or copy them where they cannot be linked (another disk, or not as readable)."""
    sources = [file.resolve() for file in files]
    device = folder.stat().st_dev
    linkable = [f.stat().st_dev == device and f.stat().st_mode & 0o777 == READABLE for f in sources]
    rest = sum(f.stat().st_size for f, links in zip(sources, linkable, strict=True) if not links)
    require_space(folder, rest, "a copy of the weights")
    for file, source, links in zip(files, sources, linkable, strict=True):
        target = folder / file.name
        if links:
            with contextlib.suppress(OSError):  # e.g. hard links are forbidden for files of other users
                os.link(source, target)
                continue
        shutil.copyfile(source, target)


def write_outline(model: Model, precision: str, weights: str, seed: int, folder: Path) -> Written:
    """Configuration and tokenizer without weights, for an engine that reads or draws the weights itself.

    A synthetic `config.json` has each value under its older name too, for engines with an older transformers.
    """
    import transformers

    with import_path():
        from llm_weights import DTYPES
    if weights == SYNTHETIC:
        check_parameters(model)
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
    where, options, source = locate(model, weights)
    with loading(model, weights):
        config, tokenizer = _describe(model, where, options)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Written(source, _end_ids(config, tokenizer, where, options), len(tokenizer))


def hush_rope_keys() -> None:
    """transformers warns of the names that it gives PhiMoE's rope parameters itself, whenever it makes that model."""
    logging.getLogger("transformers.modeling_rope_utils").addFilter(_is_about_other_than_rope_keys)


def _is_about_other_than_rope_keys(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return not any(words in said for words in ROPE_WARNINGS)
