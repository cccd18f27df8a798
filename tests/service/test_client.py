"""The client against a real server: answers, what passes, what does not, and how it asks again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from services import application, begun, examples, listening, plain, png, rails

from immunonet import Memory
from immunonet.cli import main
from immunonet.client import AsyncClient, Client, ServiceError
from immunonet.service.tokens import Tokens


def test_both_clients_ask_and_confirm(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png())
    (tmp_path / "x.gif").write_bytes(b"")
    x, y = examples()
    with listening(application(begun(rails(), Memory(tmp_path / "memory")))) as url:
        with Client(url, source="me") as client:
            found = client.respond(x[:3])
            assert [one.label for one in found] == y[:3].tolist()
            assert found[0].name == "a"
            assert sum(found[0].votes or ()) == pytest.approx(1)
            client.feedback(found[0].id, 2)
            held = client.memory()
            assert (held["confirmed"], held["contradicted"]) == (1, 1)
            client.rollback(held["version"] - 1)
            assert client.memory()["confirmed"] == 0
            assert len(client.respond(tmp_path / "x.png")) == 1
            with pytest.raises(ServiceError, match="422: ids"):
                client.feedback("nobody", 1)
            with pytest.raises(ValueError, match="PNG or JPEG"):
                client.respond(tmp_path / "x.gif")

        async def many() -> list[int]:
            async with AsyncClient(url) as client:
                found = await asyncio.gather(*(client.respond(one[None]) for one in x[:20]))
                await client.feedback(found[0][0].id, 0)
                return [one[0].label for one in found]

        assert asyncio.run(many()) == y[:20].tolist()


def test_what_passes_is_asked_again_and_what_does_not_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    app, good = FastAPI(), begun(plain())

    @app.post("/v1/respond")
    async def respond() -> Any:
        asked.append(1)
        if len(asked) < 3:
            return JSONResponse({"detail": "full"}, 429 if len(asked) == 1 else 503)
        return {"results": await good.respond(torch.zeros(1, 1, 4, 4).numpy(), "x")}

    waits: list[float] = []
    monkeypatch.setattr("immunonet.client.time", SimpleNamespace(sleep=waits.append))
    with listening(app) as url:
        with Client(url) as client:
            assert len(client.respond(torch.zeros(1, 1, 4, 4))) == 1
        assert len(asked) == 3
        assert len(waits) == 2
        asked.clear()
        with Client(url, retries=1) as client, pytest.raises(ServiceError, match="503: full"):
            client.respond(torch.zeros(1, 1, 4, 4))
        with Client(url) as client, pytest.raises(ServiceError, match="404: Not Found"):
            client.memory()
    with Client(url, retries=0) as client, pytest.raises(ConnectionError, match="no answer from http"):
        client.memory()
    with pytest.raises(ValueError, match="url must begin"):
        Client("127.0.0.1")


def test_predict_asks_a_running_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens").write_text(f"me ask {'t' * 16}\n")
    (tmp_path / "x.png").write_bytes(png())
    with listening(application(begun(rails(), tokens=Tokens.read(tmp_path / "tokens")))) as url:
        for token, told, code in (("t" * 16, "x.png\t", 0), ("no", "401", 2)):
            monkeypatch.setenv("IMMUNONET_TOKEN", token)
            with pytest.raises(SystemExit) as ended:
                main(["predict", str(tmp_path / "x.png"), "--url", url, "--json", str(tmp_path / "out.json")])
            heard = capsys.readouterr()
            assert (ended.value.code, told in heard.out + heard.err) == (code, True), heard
    row = json.loads((tmp_path / "out.json").read_text())["results"][0]
    assert row["name"] in "abc"
    assert 0 < row["share"] <= 1
