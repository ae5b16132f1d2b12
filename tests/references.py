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
