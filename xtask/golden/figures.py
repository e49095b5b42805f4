"""Distances between two sets of logit rows. The Rust tests compute the same ones (crates/testkit)."""

import torch


def row_figures(got: torch.Tensor, want: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per row: largest and root-mean-square difference of logits, KL(want || got) of their softmaxes; f64."""
    got, want = got.double(), want.double()
    diff = got - want
    lg, lw = got.log_softmax(-1), want.log_softmax(-1)
    return {
        "max": diff.abs().amax(-1),
        "rms": diff.square().mean(-1).sqrt(),
        "kl": (lw.exp() * (lw - lg)).sum(-1).clamp_min(0),
    }


def pooled(rows: dict[str, torch.Tensor]) -> dict[str, float]:
    """Over all rows (of equal width): the largest difference, the RMS of all differences, the mean KL."""
    return {
        "max": rows["max"].max().item(),
        "rms": rows["rms"].square().mean().sqrt().item(),
        "kl": rows["kl"].mean().item(),
    }
