"""The models that ours are compared with."""

import torch
import transformers
from samples import without_names


class Lifted(torch.nn.Module):
    """transformers' RMSNorm without its cast to float32."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def as_ours(raw: dict, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' tensors by our names: Phi-3 holds queries, keys and values in one, gate and up in another."""
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    keys = raw["num_key_value_heads"] * head_dim
    out = {}
    for name, tensor in tensors.items():
        if "qkv_proj" in name:
            parts = tensor.split([raw["num_attention_heads"] * head_dim, keys, keys])
            out |= {name.replace("qkv", letter): part for letter, part in zip("qkv", parts, strict=True)}
        elif "gate_up_proj" in name:
            parts = tensor.chunk(2)
            out |= {name.replace("gate_up", kind): part for kind, part in zip(("gate", "up"), parts, strict=True)}
        else:
            out[name] = tensor
    return out


def gradients_of(raw: dict, model) -> dict[str, torch.Tensor]:
    """Of transformers' model, by our names."""
    return as_ours(raw, {name: parameter.grad.detach() for name, parameter in model.named_parameters()})


def reference(raw: dict, dtype: torch.dtype):
    """transformers' model with random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(raw["model_type"], **without_names(raw))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                1 + 0.1 * torch.randn_like(parameter) if "norm" in name else 0.2 * torch.randn_like(parameter)
            )
    for name, norm in [each for each in model.named_modules() if type(each[1]).__name__.endswith("RMSNorm")]:
        model.set_submodule(name, Lifted(norm))
    return model
