"""bench/gradients.py: cosines against closed forms, and the command."""
import torch

import train
from bench import gradients
from fixtures import editor_folder, refused, run_script

TINY = (f"--model {editor_folder()} --judge exact --turns 2 --tasks 2 --group 4 --denoise 3 --lora-rank 2 --lora-alpha 2 "
        "--min-std 0")


def test_the_share_of_the_signal_is_found():
    """Catches: a pair of a gradient with itself, a mean that holds the gradient it is compared with.

    g = s u + chance of norm c: two have the cosine s^2 / (s^2 + c^2), one has s / sqrt(s^2 + c^2) with u.
    """
    generator = torch.Generator().manual_seed(0)
    n, P, s, c = 400, 3_000, .3, 1.
    u = torch.nn.functional.normalize(torch.randn(P, generator=generator), dim=0)
    g = s * u + c / P ** .5 * torch.randn(n, P, generator=generator)
    chance = torch.randn(40, P, generator=generator)
    share = s ** 2 / (s ** 2 + c ** 2)
    assert len(gradients.own_cosines(g)) == n * (n - 1) // 2
    assert abs(gradients.own_cosines(g).mean() - share) < .002
    assert abs(gradients.own_cosines(chance).mean()) < .003
    assert abs(gradients.cosines_with(g, s * u[None]).mean() - share ** .5) < .002
    assert abs(gradients.cosines_with(chance, chance).mean()) < .01
    few = g[:3]
    expected = torch.cosine_similarity(few[0], few[1] + few[2], dim=0)
    assert torch.allclose(gradients.cosines_with(few, few)[0], expected)
    assert gradients.mean_and_error(torch.tensor([.1, .3])) == "+0.2000 ± 0.1000"
    assert gradients.mean_and_error(torch.tensor([.1])) == "unknown"


def test_a_gradient_is_as_long_as_before_it_was_clipped(monkeypatch):
    """Catches: norms that are never above 1, and a mean gradient in which the largest batches count for too little."""
    cfg = train.parse(f"--algo nft {TINY} --window 1 --train-steps 0-1".split())
    plain = gradients.first_gradients(cfg, 2)
    monkeypatch.setattr(train, "GRAD_NORM", plain.norm(dim=1).min().item() / 10)
    torch.testing.assert_close(gradients.first_gradients(cfg, 2), plain, rtol=1e-4, atol=0)
    assert plain.norm(dim=1).max() < 1                                                # else they were clipped as well


def test_settings_are_compared_row_by_row():
    """Catches: a setting that is not looked at, a table that cannot be read."""
    words = [f"--algo nft {TINY} --updates 1 --window 1 --train-steps 0-1",
             f"--algo grpo {TINY} --updates 1 --window 1 --train-steps 0-1"]
    code, said, error = run_script("bench/gradients.py", *words, "--batches", "3")
    assert code == 0, error
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| --algo")]
    assert [row[0][2:] for row in rows] == words
    assert all(float(row[3].removesuffix(" |")) > 0 and "±" in row[1] + row[2] for row in rows)


def test_what_cannot_be_compared_is_refused():
    """Catches: a traceback, or hours of rollouts before a flag is found wrong."""
    assert "--batches 1 must be at least 2" in refused("bench/gradients.py", "--algo nft", "--batches", "1")
    assert "--window 9" in refused("bench/gradients.py", "--algo grpo", "--algo nft --window 9")
