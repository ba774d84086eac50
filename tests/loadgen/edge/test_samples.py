"""The prompt library: every file format and its faults, exact token lengths, salt."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from rows import make_rows
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from loadgen.core.metrics import summarise
from loadgen.core.verdict import Audit, judge
from loadgen.edge import samples, scenarios, synthetic
from loadgen.edge.errors import UserError
from loadgen.edge.prompt_files import Prompt, read_prompts
from loadgen.edge.samples import PromptLibrary

CORPUS = [p.text for p in read_prompts(samples.BUILTIN)]
WORDS = synthetic.vocabulary(CORPUS)


def library(run_id="run", **over) -> PromptLibrary:
    scenario = scenarios.resolve("single_stream", "phi-2", "smoke", over)
    return PromptLibrary(scenario.prompts, scenario, run_id)


def bodies(lib: PromptLibrary) -> list[dict]:
    return [json.loads(lib.body(i, "id")) for i in range(len(lib))]


ROWS = {
    "plain": ({"text": "a"}, Prompt("a")),
    "vllm": ({"prompt": "b", "output": "c"}, Prompt("b", "c")),
    "triton": ({"text_input": "d"}, Prompt("d")),
    "orca": ({"system_prompt": "S", "question": "Q", "response": "R"}, Prompt("S\n\nQ", "R")),
    "orca without system": ({"system_prompt": "", "question": "Q", "response": "R"}, Prompt("Q", "R")),
    "sharegpt": ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "h"},
                                    {"from": "gpt", "value": "g"}]}, Prompt("h", "g")),
    "sharegpt without answer": ({"conversations": [{"from": "user", "value": "h"}]}, Prompt("h")),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_format_reads_every_kind_of_row(tmp_path, name, suffix):
    row, prompt = ROWS[name]
    path = tmp_path / f"prompts{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row] * 3), path)
    elif suffix == ".json":
        path.write_text(json.dumps([row] * 3))
    else:
        path.write_text("\n\n".join(json.dumps(row) for _ in range(3)))
    assert read_prompts(path) == [prompt] * 3
    assert read_prompts(path, 2) == [prompt] * 2


BROKEN = [
    (
        "p.jsonl",
        '{"text": "a"}\n{"text": ""}\n',
        "p.jsonl line 2: expected a non-empty text under one of: text, prompt",
    ),
    ("p.jsonl", '{"text": "a"}\n\nnot json\n', "p.jsonl line 3: this is no JSON"),
    ("p.jsonl", '["a"]\n', "p.jsonl line 1: expected an object, not a list"),
    ("p.jsonl", '{"text": 7}\n', "p.jsonl line 1: expected a non-empty text"),
    ("p.jsonl", "\n", "p.jsonl holds no prompts"),
    ("p.jsonl", b"\xff\xfe", "cannot read prompts from"),
    ("p.json", '[{"text": "a"},\n {"conversations": []}]', "p.json entry 2: the conversation has no turn"),
    ("p.json", '[{"conversations": [{"from": "gpt", "value": "g"}]}]', "p.json entry 1: the conversation has no turn"),
    ("p.json", '[{"conversations": "no"}]', "p.json entry 1: the conversation has no turn"),
    ("p.json", '{"text": "a"}', "p.json: expected a list of conversations or prompts, not a dict"),
    ("p.json", '[\n{"text": }]', "p.json line 2: this is no JSON"),
    ("p.json", "[]", "p.json holds no prompts"),
    ("p.parquet", "PAR1 is not enough", "p.parquet is no readable Parquet file"),
    ("nowhere.jsonl", None, "nowhere.jsonl: No such file or directory; give a JSONL, JSON or Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_broken_row_is_one_line_that_names_it(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_parquet_rows_and_columns_are_named(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"text": ["a", None, "c"]}), path)
    with pytest.raises(UserError, match=r"p.parquet row 2: expected a non-empty text"):
        read_prompts(path)
    pq.write_table(pa.table({"words": ["a"]}), path)
    with pytest.raises(UserError, match=r"p.parquet holds no prompts; expected a row with one of: text"):
        read_prompts(path)


def test_a_file_library_has_bodies_references_and_lengths_a_sample(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"q{i}", "response": f"r{i}"}) for i in range(50)))
    lib = library(prompts=path, salt="off", output_tokens="uniform:4-9", max_prompts=40)
    assert lib.texts == [f"q{i}" for i in range(40)]
    assert lib.references == [f"r{i}" for i in range(40)]
    asked = [lib.asks(i) for i in range(40)]
    assert {n for n, _ in asked} == set(range(4, 10)) and {n for _, n in asked} == {None}
    for body, (tokens, _) in zip(bodies(lib), asked, strict=True):
        assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (tokens, tokens, True)
    assert [b["text_input"] for b in bodies(lib)] == lib.texts
    again = library(prompts=path, salt="off", output_tokens="uniform:4-9", max_prompts=40)
    assert (again.sha256, again.body(3, "x")) == (lib.sha256, lib.body(3, "x"))


def test_a_salt_is_new_in_each_run_and_sample_and_the_same_for_a_pair():
    first, second = library("run 1"), library("run 2")
    heads = {text[:10] for lib in (first, second) for text in lib.texts}
    assert len(heads) == 2 * len(first) == 512
    assert len({head[:4] for head in heads}) > 500  # they part early, not only at their end
    assert first.sha256 == second.sha256
    assert [t[11:] for t in first.texts] == CORPUS
    pair = [library(run_id, salt_seed=7).texts for run_id in ("a", "b")]
    assert pair[0] == pair[1] != library("a", salt_seed=8).texts
    assert library(salt="off").texts == CORPUS


def bpe(size, *, special=False, prefix=False):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def bpe_over_spaces():
    """As Llama 2's: no pre-tokenizer, so that merges reach over words and counts do not add up."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:20], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def wordpiece():
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


TOKENIZERS = {
    "letters": lambda: bpe(257), "small bpe": lambda: bpe(400), "bpe with bos": lambda: bpe(2048, special=True),
    "bpe with prefix space": lambda: bpe(1500, prefix=True), "bpe over spaces": bpe_over_spaces, "wordpiece": wordpiece,
}  # fmt: skip


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer_file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = TOKENIZERS[request.param]()
    tokenizer.enable_truncation(8)  # as many published files have it; a server switches it off
    tokenizer.save(str(path))
    return path


def ids_of(path, texts):
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    return [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("lengths", ["fixed:40", "uniform:24-90", "normal:150,25"])
def test_synthetic_prompts_have_exactly_their_lengths(tokenizer_file, lengths):
    over = {"prompts": "synthetic", "tokenizer": tokenizer_file, "input_tokens": lengths, "max_prompts": 80}
    first, second = library("one", **over), library("two", **over)
    wanted = [first.asks(i)[1] for i in range(80)]
    if lengths == "fixed:40":
        assert set(wanted) == {40}
    for lib in (first, second):
        ids = ids_of(tokenizer_file, lib.texts)
        assert [len(x) for x in ids] == wanted
        assert len({tuple(x[:16]) for x in ids}) == 80  # no two samples share a block of a prefix cache
    assert not {tuple(x[:16]) for x in ids_of(tokenizer_file, first.texts)} & {
        tuple(x[:16]) for x in ids_of(tokenizer_file, second.texts)
    }
    assert first.sha256 == second.sha256
    assert first.texts == library("one", **over).texts
    assert library("one", **over, salt="off").texts == library("two", **over, salt="off").texts
    assert library(**over, prompt_seed=5).sha256 != first.sha256


def test_synthetic_faults_are_one_line(tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe(400, special=True).save(str(path))
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    base = {"prompts": "synthetic", "input_tokens": "8", "max_prompts": 4}
    for over, message in [
        ({}, "--prompts synthetic needs --tokenizer FILE"),
        ({"tokenizer": tmp_path / "none.json"}, "none.json: no such file"),
        ({"tokenizer": broken}, "broken.json cannot be read"),
        (
            {"tokenizer": path, "input_tokens": "1"},
            "asks for a prompt of 1 tokens, but the tokenizer adds 1 of its own",
        ),
        (
            {"tokenizer": path, "input_tokens": "2", "max_prompts": 400},
            "no 400 different prompts of the lengths asked for",
        ),
    ]:
        with pytest.raises(UserError) as caught:
            library(**base | over)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompt_that_the_server_counts_otherwise_is_a_reason():
    scenario = scenarios.resolve("single_stream", "phi-2", overrides={"duration_s": 0.1})
    row = {"due": 0, "chunks": [1, 2], "tokens": [1, 1], "tokens_in": 40}
    for asked, expected in ((40, 0), (41, 1), (None, 0)):
        rows = make_rows([row if asked is None else row | {"asked_in": asked}])
        summary, rows = summarise([rows], scenario)
        verdict = judge(summary, rows, scenario, Audit((), 1, 1, 1, 1.0))
        assert [r.code for r in verdict.reasons].count("input_length") == expected
