import torch
from torch import nn

from immunonet import RAILS, Maturation

X, Y = torch.rand(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3


def test_a_response_is_short_in_print():
    rails = RAILS(nn.Linear(4, 3), ["input", torch.square], maturation=Maturation(population=90, neighbours=3), seed=0)
    r = rails.fit(X, Y).respond(X[:20], trace=True)
    r.foreign[:] = torch.arange(20) < 2
    labels = ", ".join(map(str, r.labels[:8].tolist()))
    # 5 and 20 percent of 90 cells at each of two layers; generations 0 to 10.
    assert repr(r) == (
        f"ImmuneResponse(20 antigens; labels {labels}, ...; 2 foreign; votes (20, 3); plasma (20, 8, 4); "
        "memory (20, 36, 4); trace 2 x (11, 20, 3))"
    )
    one = rails.respond(X[:1])
    assert repr(one).startswith(f"ImmuneResponse(1 antigen; labels {int(one.labels)}; ")
    assert (repr(r.plasma), repr(r.trace[0])) == ("Cells(x (20, 8, 4))", "Trace(votes (11, 20, 3))")
