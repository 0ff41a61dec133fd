"""What pathway_loss says where its arguments are wrong: one sentence, with the way out."""

import pytest
import torch

from kdfast import pathway_loss

M = torch.zeros(2, 3, 4, 4)
ERRORS = {
    "not a list": (TypeError, r"students must be a list of feature maps, got Tensor; put it in a list\.",
                   lambda: pathway_loss(M, M)),
    "lengths": (ValueError, r"students and teachers must be lists of the same length, at least 1, got 1 and 2; repeat",
                lambda: pathway_loss([M], [M, M])),
    "empty": (ValueError, r"students and teachers must be lists of the same length, at least 1, got 0 and 0; repeat",
              lambda: pathway_loss([], [])),
    "three dimensions": (ValueError, r"teachers\[0\] must be a floating point map \[batch, channels, height, width\], "
                         r"got torch\.float32 \[3, 4, 4\]\.", lambda: pathway_loss([M], [M[0]])),
    "not a tensor": (TypeError, r"students\[1\] must be a floating point map \[batch, channels, height, width\], got "
                     r"int\.", lambda: pathway_loss([M, 3], [M, M])),
    "channels": (ValueError, r"students\[0\] and teachers\[0\] must have the same batch size and channels, got "
                 r"\[2, 3, 4, 4\] and \[2, 2, 4, 4\]; project", lambda: pathway_loss([M], [M[:, :2]])),
    "batch": (ValueError, r"students\[0\] and teachers\[0\] must have the same batch size, got \[2, 3, 4, 4\] and "
              r"\[1, 3, 4, 4\]; project", lambda: pathway_loss([M], [M[:1]], distance="attention")),
    "devices": (ValueError, r"All maps must be on one device, got meta for teachers\[0\] and cpu for students\[0\]; "
                r"move", lambda: pathway_loss([M], [M.to("meta")])),
    "distance": (ValueError, r"distance must be one of 'mse', 'l1', 'hcl', 'attention', got 'l2'\.",
                 lambda: pathway_loss([M], [M], distance="l2")),
    "resize": (ValueError, r"resize must be one of 'nearest', 'bilinear', got 'area'\.",
               lambda: pathway_loss([M], [M], resize="area")),
    "weights": (ValueError, r"weights must hold one number a pathway \[1\], got torch\.float32 \[2\]\.",
                lambda: pathway_loss([M], [M], [1.0, 2.0])),
    "weights' device": (ValueError, r"weights must be on the maps' device cpu, got meta; move them",
                        lambda: pathway_loss([M], [M], torch.ones(1, device="meta"))),
    "keep's length": (ValueError, r"keep must be one bool a pathway, 1 in all, or indices, got \[True, False\]\.",
                      lambda: pathway_loss([M], [M], keep=[True, False])),
    "keep's range": (ValueError, r"keep must be different indices in \[0, 1\), or one bool a pathway, got \[1\]\.",
                     lambda: pathway_loss([M], [M], keep=[1])),
    "keep's type": (ValueError, r"keep must be one bool a pathway \[1\], got torch\.int64 \[1\]\.",
                    lambda: pathway_loss([M], [M], keep=torch.tensor([0]))),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_one_clear_sentence(case):
    kind, text, attempt = ERRORS[case]
    with pytest.raises(kind, match=f"^{text}"):
        attempt()
