"""A tokenizer of bytes, for benchmarks whose figures do not depend on which text is asked."""

from __future__ import annotations

from pathlib import Path


def save_byte_tokenizer(folder: Path) -> None:
    """Write it as transformers' T5 pipelines read it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {piece: i for i, piece in enumerate(["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    wrapped.save_pretrained(folder)
