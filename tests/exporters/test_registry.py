"""The catalogue and the registry: what there is, and one exporter for each pair."""

import pytest

from exporters import registry
from exporters.catalogue import find_model, load_catalogue
from exporters.errors import UserError


def test_duplicates_name_both(monkeypatch):
    monkeypatch.setattr(registry, "_exporters", {})

    @registry.exporter("llm", "x")
    def first(order, version): ...

    with pytest.raises(ValueError, match=r"first.*second"):

        @registry.exporter("llm", "x")
        def second(order, version): ...


def test_finds_the_eager_exporter():
    assert "torch-eager" in registry.backends_of("llm")
    assert registry.find_exporter("llm", "torch-eager").__name__ == "export_llm_torch_eager"


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(UserError, match="torch-eager"):
        registry.find_exporter("llm", "abacus")


def test_why_a_backend_has_no_path_is_its_own_word(monkeypatch):
    for name in ("_exporters", "_precisions", "_reasons"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    registry.exporter("llm", "x", precisions=lambda model: (), no_path=lambda model: f"no x of {model.name}")(
        find_model
    )
    registry.exporter("llm", "y", precisions=lambda model: ())(find_model)
    assert registry.no_path(find_model("phi-2"), "x") == "no x of phi-2"
    assert registry.no_path(find_model("phi-2"), "y") == "y has no path for phi-2; choose another backend"


def test_unknown_model_lists_the_known_ones():
    with pytest.raises(UserError, match="phi-2-tiny"):
        find_model("phi-3")


def test_catalogue_is_whole():
    for model in load_catalogue().values():
        assert model.precisions and model.parameters > 0
        assert model.max_context == 226 if model.family == "video" else model.max_context >= 2048
        assert model.hub_id == "" or model.family == "video" or len(model.revision) == 40
    assert find_model("phi-2-tiny").tiny_of == "phi-2"


@pytest.mark.parametrize("name", ["phi-2", "phi-2-tiny"])
def test_parameters_are_counted_right(name):
    import torch
    import transformers

    model = find_model(name)
    with torch.device("meta"):
        network = getattr(transformers, model.model_class)(getattr(transformers, model.config_class)(**model.config))
    assert sum(weight.numel() for weight in network.parameters()) == model.parameters
