"""Every kernel's launcher is an operation of torch: its schema tells the truth about what it changes, and pretended tensors pass through it
as real ones do."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (Linux)")
from megacpt_kernels import Documents
from megacpt_kernels.backend import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before the first import")
X, W = torch.randn(6, 8), torch.randn(8)
Q, K = torch.randn(6, 2, 8), torch.randn(6, 1, 8)
TABLE, AT = torch.randn(9, 4), torch.arange(6, dtype=torch.int32)
COLUMN, ROWS = torch.tensor([0, 3, -7, 2, 1, 5]), torch.ones(6)
DOCUMENTS = Documents.of([0, 2], 6)
SEEN = [DOCUMENTS.key_range, DOCUMENTS.query_range]
NUMBERS = (0.9, 0.95, 0.1, 0.05, 1e-3, 1.0, 1e-8, 0.99, 0, 8, 8, 5)
CALLS = {
    "rms_norm_forward": (X, None, W, 1e-5),
    "rms_norm_backward": (X, X.clone(), X.clone(), W, ROWS),
    "rope_qk": (Q, K, TABLE, TABLE.clone(), AT, -1),
    "rope_qk_": (Q.clone(), K.clone(), TABLE, TABLE.clone(), AT, 1),
    "swiglu_forward": (X, X.clone()),
    "swiglu_backward": (X, X.clone(), X.clone()),
    "cross_entropy_statistics": (X, COLUMN, 7),
    "cross_entropy_gradient_": (X.clone(), COLUMN, 7, ROWS, ROWS.clone(), ROWS.clone()),
    "linear_lse": (X, torch.randn(5, 8), COLUMN, 5),
    "embedding_forward": (COLUMN, X),
    "embedding_backward": (X, COLUMN.clamp(0, 6).sort().values, COLUMN.clamp(0, 6).sort().indices, 6),
    "sums_of_squares": (X,),
    "adamw_": (X.clone(), X.clone(), X.clone().bfloat16(), X.abs().bfloat16(), torch.ones(()), *NUMBERS),
    "attention_forward": (Q, K, K.clone(), SEEN, [4, 4], "triton", False),
    "attention_backward": (Q, Q.clone(), K, K.clone(), Q.clone(), torch.zeros(2, 6), SEEN, [4, 4], "triton", False),
}


@pytest.mark.parametrize("name", CALLS)
def test_schema_and_pretended_tensors(name):
    operation = getattr(torch.ops.megacpt_kernels, name).default
    torch.library.opcheck(operation, CALLS[name], test_utils=("test_schema", "test_faketensor"))


def test_all_are_here():
    registered = {
        s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("megacpt_kernels::")
    }
    assert registered == CALLS.keys()
