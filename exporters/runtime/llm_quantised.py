"""Linear layers and experts whose weights are held in 8 bit, one scale for each output. Runs inside Triton; imports
nothing of this project.

    fp8   float8_e4m3fn; with compute capability 8.9 the product itself is fp8: activations get a scale for each token
    int8  weight only: multiplied back before the product, so it saves memory and not arithmetic

Why not torchao (0.18 was tried): its dynamic fp8 refuses a CPU, so the small models could not run the same code in
tests, and it leaves experts, which are 3-D parameters, alone. transformers' FineGrainedFP8Config loads its kernels from
the hub while the model runs. `torch._scaled_mm` and `torch._scaled_grouped_mm` need neither, and can be captured.

On a CPU the fp8 product is the weight-only one: activations are not rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the name that torch's own documentation uses)

STORAGE = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}  # precision -> what weights are held in
FP8_CAPABILITY, GROUPED_CAPABILITY = (8, 9), (9, 0)  # of the fp8 product, and of the one over experts
_MOST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
_LEAST_SCALE = 1e-12  # a row of zeros


def quantise(weight: torch.Tensor, storage: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [..., outputs, inputs] as `storage`, and the scales [..., outputs, 1] (fp32) that multiply it back."""
    most = _MOST[storage]
    scale = (weight.abs().amax(-1, keepdim=True).float() / most).clamp_min(_LEAST_SCALE)
    held = (weight / scale).clamp_(-most, most)  # in fp32, as the scale is, without a copy of the weight in it
    return (held.round_() if storage is torch.int8 else held).to(storage), scale


def _back(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (weight.to(dtype).float() * scale).to(dtype)


def _is_native(weight: torch.Tensor, capability: tuple[int, int]) -> bool:
    on_gpu = weight.is_cuda and weight.dtype is torch.float8_e4m3fn
    return on_gpu and torch.cuda.get_device_capability(weight.device) >= capability


class ScaledLinear(torch.nn.Module):
    """Stands in for a torch.nn.Linear: `weight` [outputs, inputs] in 8 bit, `scale` [outputs, 1], `bias` or None."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.scale = torch.nn.Buffer(scale)
        self.bias = bias
        self._native = _is_native(weight, FP8_CAPABILITY)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self._native:
            return F.linear(hidden, _back(self.weight, self.scale, hidden.dtype), self.bias)
        rows, scale = quantise(hidden.reshape(-1, self.in_features), torch.float8_e4m3fn)
        product = torch._scaled_mm(
            rows, self.weight.t(), scale_a=scale, scale_b=self.scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
        product = product if self.bias is None else product + self.bias
        return product.to(hidden.dtype).view(*hidden.shape[:-1], self.out_features)


# An operator, since the compiler would make code of its own for each way of sharing tokens out among the experts.
@torch.library.custom_op("tritonmark::expert_product", mutates_args=())
def expert_product(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """One expert after the other, multiplied back: `rows` [R, inputs] sorted by expert, `ends` [experts]."""
    answer = rows.new_empty(len(rows), weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            answer[start:end] = F.linear(rows[start:end], _back(weight[expert], scale[expert], rows.dtype))
        start = end
    return answer


@expert_product.register_fake
def _(rows, weight, scale, ends):
    return rows.new_empty(rows.shape[0], weight.shape[1])  # len() would fix the number in compiled code


class ScaledExperts(torch.nn.Module):
    """Stands in for transformers' experts: `gate_up_proj` [experts, 2 x inner, hidden] and `down_proj` [experts,
    hidden, inner] in 8 bit. Called with hidden states [T, hidden], and experts and their weights, both [T, k]."""

    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn
        self._native = False

    def put(self, name: str, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Set one of the two weights, with its scales [experts, outputs, 1]."""
        self.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
        self.register_buffer(f"{name}_scale", scale)
        self._native = _is_native(weight, GROUPED_CAPABILITY)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)  # the rows of one expert become neighbours
        numbers = torch.arange(self.num_experts, device=flat.device, dtype=flat.dtype)
        ends = torch.searchsorted(flat[order], numbers, right=True).to(torch.int32)
        gate, up = self._product(hidden[order // chosen.shape[1]], "gate_up_proj", ends).chunk(2, dim=-1)
        answer = self._product(self.act_fn(gate) * up, "down_proj", ends) * shares.reshape(-1)[order, None]
        # Back in the order of the tokens by index, not by adding up: so sums have one order, and equal runs are equal.
        return answer[order.argsort()].view(*chosen.shape, -1).sum(1).to(hidden.dtype)

    def _product(self, rows: torch.Tensor, name: str, ends: torch.Tensor) -> torch.Tensor:
        """`rows` [R, inputs], sorted by expert, times each row's expert; `ends` [experts] is where each one's stop."""
        weight, scale = getattr(self, name), getattr(self, f"{name}_scale")
        if self._native:
            held, row_scale = quantise(rows, torch.float8_e4m3fn)
            return torch._scaled_grouped_mm(
                held, weight.transpose(-2, -1), row_scale.squeeze(-1), scale.squeeze(-1), offs=ends,
                out_dtype=torch.bfloat16, use_fast_accum=True,
            ).to(rows.dtype)  # fmt: skip
        return expert_product(rows, weight, scale, ends)


def hold(model: torch.nn.Module, name: str, weight: torch.Tensor, storage: torch.dtype) -> bool:
    """Put `weight` into `model` as its parameter `name`, in 8 bit; False, and nothing done, where that parameter stays
    as it is: embeddings, output layer, router, norms and biases."""
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    if ".layers." not in f".{name}":
        return False
    owner_path, _, title = path.rpartition(".")
    if weight.ndim == 3:
        if not isinstance(parent, ScaledExperts):
            parent = ScaledExperts(parent)
            setattr(model.get_submodule(owner_path), title, parent)
        pairs = [quantise(expert, storage) for expert in weight]  # one by one: the fp32 copy of all would not fit
        parent.put(leaf, torch.stack([held for held, _ in pairs]), torch.stack([scale for _, scale in pairs]))
        return True
    if type(parent) is not torch.nn.Linear or leaf != "weight":
        return False
    held, scale = quantise(weight, storage)
    setattr(model.get_submodule(owner_path), title, ScaledLinear(held, scale, parent.bias))
    return True
