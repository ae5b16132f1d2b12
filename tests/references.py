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
    config = transformers.LlamaConfig(**without_names(raw))
    config._attn_implementation = "sdpa"
    model = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                1 + 0.1 * torch.randn_like(parameter) if "norm" in name else 0.2 * torch.randn_like(parameter)
            )
    for layer in model.model.layers:
        layer.input_layernorm = Lifted(layer.input_layernorm)
        layer.post_attention_layernorm = Lifted(layer.post_attention_layernorm)
    model.model.norm = Lifted(model.model.norm)
    return model
