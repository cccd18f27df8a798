"""The routes, through the real application and real sockets: answers, roles, limits, and whatever strangers send."""

from __future__ import annotations

import gc
import json
import re
import struct
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from services import SHAPE, application, begun, examples, listening, plain, png, rails

from immunonet import Memory, Sentinel
from immunonet.service.answering import settle
from immunonet.service.batching import Full
from immunonet.service.limits import Limits
from immunonet.service.replicas import Replicas
from immunonet.service.tokens import Tokens

GREY = [[[[0.5] * 4] * 4]]
KEYS = {"id", "label", "class", "votes", "credibility", "foreign", "innate", "recalled", "suspicious"}


@pytest.fixture(scope="module")
def small() -> Iterator[httpx.Client]:
    limits = Limits(body=20_000, pixels=1000, batch=4, queue=8)
    with listening(application(begun(plain(), limits=limits))) as url, httpx.Client(base_url=url) as client:
        yield client


def test_inputs_and_images_get_the_contracts_answer(small: httpx.Client) -> None:
    found = small.post("/v1/respond", json={"inputs": GREY * 3}).json()["results"]
    assert [set(one) for one in found] == [KEYS] * 3
    logits = plain().defence(torch.full((1, *SHAPE), 0.5))
    assert [one["label"] for one in found] == [int(logits.argmax())] * 3
    assert found[0]["class"] == "abc"[found[0]["label"]]
    assert found[0]["votes"] == pytest.approx(logits.exp()[0].tolist(), abs=1e-5)
    assert found[0]["foreign"] is found[0]["credibility"] is found[0]["suspicious"] is None
    dark = small.post("/v1/respond", json={"inputs": [[[[0] * 4] * 4]]}).json()["results"][0]
    for kind in ("png", "jpeg"):
        answer = small.post("/v1/respond", content=png(kind=kind.upper()), headers={"Content-Type": f"image/{kind}"})
        assert answer.json()["results"][0]["votes"] == dark["votes"]


def bomb() -> bytes:
    """Return a PNG that says it is 60,000 pixels wide and high."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


WRONG: list[tuple[str, Any, str, int, str]] = [
    ("nothing", b"", "application/json", 422, "Expecting value"),
    ("no object", b"[1]", "application/json", 422, "JSON object"),
    ("another key", b'{"input": [1]}', "application/json", 422, "inputs"),
    ("no list", b'{"inputs": 3}', "application/json", 422, "inputs"),
    ("none", b'{"inputs": []}', "application/json", 422, "inputs"),
    ("text", b'{"inputs": ["a"]}', "application/json", 422, "inputs"),
    ("ragged", b'{"inputs": [[1], [1, 2]]}', "application/json", 422, "inputs"),
    ("null", b'{"inputs": [[null]]}', "application/json", 422, "inputs"),
    ("NaN", json.dumps({"inputs": [[[[float("nan")] * 4] * 4]]}).encode(), "application/json", 422, "finite"),
    ("1e400", b'{"inputs": [[[[1e400,1,1,1],[1,1,1,1],[1,1,1,1],[1,1,1,1]]]]}', "application/json", 422, "finite"),
    ("digits", b'{"inputs": [' + b"9" * 6000 + b"]}", "application/json", 422, ""),
    ("deep", b'{"inputs": ' + b"[" * 9000, "application/json", 422, ""),
    ("outside", json.dumps({"inputs": [[[[7.0] * 4] * 4]]}).encode(), "application/json", 422, "bounds"),
    ("shape", b'{"inputs": [[1.0, 2.0]]}', "application/json", 422, "shape"),
    ("many", json.dumps({"inputs": GREY * 5}).encode(), "application/json", 422, "1 to 4 inputs"),
    ("latin", b'{"inputs": "\xff"}', "application/json", 422, ""),
    ("long", b'{"inputs": [' + b"1," * 20_000 + b"1]}", "application/json", 413, "20,000 bytes"),
    ("form", b"a=1", "application/x-www-form-urlencoded", 415, "content type"),
    ("no kind", b"a", "", 415, "content type"),
    ("no image", b"hello", "image/png", 422, "no PNG"),
    ("cut", png((20, 20), mode="RGB")[:60], "image/png", 422, "image"),
    ("another format", png(kind="JPEG"), "image/png", 422, "no PNG"),
    ("size", png((5, 4)), "image/png", 422, "shape"),
    ("pixels", png((40, 40)), "image/png", 413, "1,000 pixels"),
    ("bomb", bomb(), "image/png", 422, "image"),
]


@pytest.mark.parametrize(("body", "kind", "status", "told"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_cannot_be_asked_is_refused_in_words(
    small: httpx.Client, body: bytes, kind: str, status: int, told: str
) -> None:
    answer = small.post("/v1/respond", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    assert told in answer.json()["detail"]
    assert "Traceback" not in answer.text


def test_a_body_of_unknown_length_is_cut_off(small: httpx.Client) -> None:
    sent = small.post("/v1/respond", content=(b"x" * 1000 for _ in range(30)), headers={"Content-Type": "image/png"})
    assert sent.status_code == 413


def test_health_readiness_metrics_and_documents(small: httpx.Client) -> None:
    assert small.get("/healthz").json() == {"status": "alive"}
    assert small.get("/readyz").status_code == 200
    small.post("/v1/respond", json={"inputs": GREY})
    told = small.get("/metrics").text
    assert re.search(r'immunonet_requests_total\{route="/v1/respond",status="200"\} [1-9]', told)
    for name in ("batch_inputs_count", "queue_inputs", "memory_entries", "flags_total", "recalls_total"):
        assert f"immunonet_{name}" in told
    paths = small.get("/openapi.json").json()["paths"]
    assert set(paths["/v1/respond"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "image/png",
        "image/jpeg",
    }
    assert "immunonet" in small.get("/docs").text
    assert small.get("/nowhere").json()["detail"] == "Not Found"
    assert small.get("/v1/respond").status_code == 405
    for path in ("/v1/feedback", "/v1/memory/rollback", "/v1/memory/forget"):
        assert small.post(path, json={"x": 1}).status_code == 422
    assert small.get("/v1/memory").status_code == 404
    assert small.post("/v1/reload").status_code == 503


def test_before_it_is_ready_and_when_it_is_full_or_late(monkeypatch: pytest.MonkeyPatch) -> None:
    from immunonet.service.app import Service

    service = Service(plain(), limits=Limits(seconds=0.05))
    with listening(application(service)) as url, httpx.Client(base_url=url) as client:
        assert client.get("/readyz").status_code == 503
        first = client.post("/v1/respond", json={"inputs": GREY})
        assert (first.status_code, first.headers["Retry-After"]) == (503, "2")

        async def never(x: Any, sources: Any) -> Any:
            import asyncio

            await asyncio.sleep(0.5)
            return [{}] * len(x)

        service.begin(never, at_once=1)
        assert client.post("/v1/respond", json={"inputs": GREY}).status_code == 504

        def full(n: int) -> None:
            raise Full(3.2)

        admits = service._batcher.admit  # type: ignore[union-attr]
        monkeypatch.setattr(service._batcher, "admit", full)
        answer = client.post("/v1/respond", json={"inputs": GREY})
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "4")

        async def broken(x: Any, source: str) -> Any:
            raise RuntimeError("a secret of the house")

        monkeypatch.setattr(service._batcher, "admit", admits)
        monkeypatch.setattr(service._batcher, "ask", broken)
        answer = client.post("/v1/respond", json={"inputs": GREY})
        assert answer.status_code == 500
        assert "secret" not in answer.text


def test_a_memory_is_written_confirmed_recalled_and_rolled_back(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "memory")
    x, _ = examples()
    body = {"inputs": x[:1].tolist()}
    with listening(application(begun(rails(), memory))) as url, httpx.Client(base_url=url) as client:
        first = client.post("/v1/respond", json=body, headers={"X-Source": "site"}).json()["results"][0]
        before = client.get("/v1/memory").json()
        assert before["entries"] == 1
        assert before["sources"]["site"]["entries"] == 1
        wrong = (first["label"] + 1) % 3
        assert client.post("/v1/feedback", json={"id": first["id"], "label": wrong}).json()["label"] == wrong
        again = client.post("/v1/respond", json=body).json()["results"][0]
        assert (again["label"], again["recalled"], again["id"]) == (wrong, True, first["id"])
        rolled = client.post("/v1/memory/rollback", json={"version": before["version"]}).json()
        assert rolled["entries"] == 1
        for sent, told in (
            ({"id": "nobody", "label": 0}, "ids"), ({"id": first["id"], "label": 3}, "labels"),
            ({"id": first["id"], "label": True}, "labels"), ({"id": 3, "label": 0}, "ids"),
        ):  # fmt: skip
            answer = client.post("/v1/feedback", json=sent)
            assert (answer.status_code, told in answer.json()["detail"]) == (422, True), answer.text
        assert client.post("/v1/memory/rollback", json={"version": 999}).status_code == 422
        assert client.post("/v1/memory/rollback", json={"version": None}).status_code == 422
        assert client.post("/v1/memory/forget", json={"source": "site"}).json()["forgotten"] == 1
        assert client.post("/v1/respond", json=body, headers={"X-Source": "s" * 300}).status_code == 422
        assert "immunonet_memory_entries 0.0" in client.get("/metrics").text


def test_a_capacity_below_what_a_memory_holds_is_refused_before_any_of_it_goes(tmp_path: Path) -> None:
    x, _ = examples()
    memory = Memory(tmp_path / "memory")
    memory.remember(rails().defence.with_settings(memory=memory).respond(x[:5]), x[:5])
    Replicas(rails, batch=1, memory=tmp_path / "memory", capacity=5).check_memory()
    Replicas(rails, batch=1).check_memory()
    with pytest.raises(ValueError, match=r"--capacity must be at least the 5 entries of .*, got 4"):
        Replicas(rails, batch=1, memory=tmp_path / "memory", capacity=4).check_memory()


def test_what_a_holder_sent_is_forgotten_by_his_name_whatever_he_called_it(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "memory")
    x, _ = examples()
    with listening(application(begun(rails(), memory))) as url, httpx.Client(base_url=url) as client:
        for i, source in enumerate(("site/1", "site/2", "sites", "site")):
            client.post("/v1/respond", json={"inputs": x[i : i + 1].tolist()}, headers={"X-Source": source})
        assert client.post("/v1/memory/forget", json={"source": "site"}).json()["forgotten"] == 3
        assert set(client.get("/v1/memory").json()["sources"]) == {"sites"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "same"}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Origin": "http://other.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "rebound.example"}, 403),
    ],
    ids=str,
)
def test_pages_of_others_may_not_ask_a_service_without_tokens(headers: dict[str, str], status: int) -> None:
    with listening(application(begun(plain()))) as url, httpx.Client(base_url=url) as client:
        headers = {name: url if value == "same" else value for name, value in headers.items()}
        answer = client.post("/v1/respond", json={"inputs": GREY}, headers=headers)
        assert answer.status_code == status
        assert status == 200 or "token-file" in answer.json()["detail"]


def test_tokens_take_the_place_of_names(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"site ask {'a' * 16}\n")
    service = begun(plain(), tokens=Tokens.read(tmp_path / "tokens"))
    with listening(application(service)) as url, httpx.Client(base_url=url) as client:
        headers = {"Authorization": f"Bearer {'a' * 16}", "Host": "service.example", "Origin": "https://page.example"}
        assert client.post("/v1/respond", json={"inputs": GREY}, headers=headers).status_code == 200


def test_what_changes_a_memory_must_come_as_json(tmp_path: Path) -> None:
    with listening(application(begun(rails(), Memory(tmp_path / "m")))) as url, httpx.Client(base_url=url) as client:
        answer = client.post("/v1/memory/forget", content='{"source": "x"}', headers={"Content-Type": "text/plain"})
        assert (answer.status_code, answer.json()) == (415, {"detail": "the content type must be application/json"})


def test_a_picture_whose_metadata_are_damaged_is_no_picture(small: httpx.Client) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    whole = png()
    damaged = whole[:33] + chunk(b"eXIf", b"Exif\0\0II*\0") + whole[33:]
    answer = small.post("/v1/respond", content=damaged, headers={"Content-Type": "image/png"})
    assert (answer.status_code, "not a readable image" in answer.json()["detail"]) == (422, True)


def test_roles_are_kept(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"site ask {'a' * 16}\nlab confirm {'c' * 16}\nboss admin {'b' * 16}\n")
    service = begun(rails(), Memory(tmp_path / "memory"), tokens=Tokens.read(tmp_path / "tokens"))
    routes: list[tuple[str, str, Any, str]] = [
        ("POST", "/v1/respond", {"inputs": GREY}, "abc"), ("POST", "/v1/feedback", {"id": "x", "label": 0}, "bc"),
        ("GET", "/v1/memory", None, "bc"), ("POST", "/v1/memory/rollback", {"version": 1}, "b"),
        ("POST", "/v1/memory/forget", {"source": "x"}, "b"), ("POST", "/v1/reload", None, "b"),
    ]  # fmt: skip
    with listening(application(service)) as url, httpx.Client(base_url=url) as client:
        for method, path, body, may in routes:
            nobody = client.request(method, path, json=body)
            assert (nobody.status_code, nobody.headers["WWW-Authenticate"]) == (401, "Bearer")
            for who in "abc":
                answer = client.request(method, path, json=body, headers={"Authorization": f"Bearer {who * 16}"})
                assert (answer.status_code == 403) is (who not in may), (path, who, answer.text)
        assert client.get("/healthz").status_code == 200
        site = {"Authorization": f"Bearer {'a' * 16}", "X-Source": "front"}
        client.post("/v1/respond", json={"inputs": examples()[0][:1].tolist()}, headers=site)
        held = client.get("/v1/memory", headers={"Authorization": f"Bearer {'b' * 16}"}).json()
        assert "site/front" in held["sources"]


@pytest.mark.parametrize("action", ["mark", "refuse", "label-only", "random-delay"])
def test_what_happens_to_a_flagged_query_is_the_operators_choice(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("immunonet.service.flags.DELAY", 0.01)
    loaded = plain()
    clean = torch.rand(400, *SHAPE, generator=torch.Generator().manual_seed(1))
    watch = Sentinel(loaded.defence, "input", neighbours=2, window=50, false_alarm=0.05).fit(clean)
    app = application(begun(loaded, sentinel=watch, on_flag=action))
    with listening(app) as url, httpx.Client(base_url=url) as client:
        answers = [client.post("/v1/respond", json={"inputs": GREY}) for _ in range(3)]
        told = client.get("/metrics").text
    assert answers[0].json()["results"][0]["suspicious"] is False
    assert answers[0].json()["results"][0]["votes"]
    last = answers[-1]
    if action == "refuse":
        assert last.status_code == 403
    else:
        found = last.json()["results"][0]
        assert found["suspicious"] is True
        assert (found["votes"] is None) is (action == "label-only")
        assert found["label"] == answers[0].json()["results"][0]["label"]
    assert "immunonet_flags_total 1.0" in told


def test_what_is_loaded_is_left_out_of_searches_for_garbage_and_what_is_garbage_goes() -> None:
    class Node:
        def __init__(self) -> None:
            self.itself = self

    gone, kept = weakref.ref(Node()), Node()
    try:
        settle()
        assert gone() is None
        assert not any(found is kept for found in gc.get_objects())
        # Of a defence that is read again, nothing of the one before stays.
        once = weakref.ref(kept)
        del kept
        gc.collect()
        assert once() is not None
        settle()
        assert once() is None
    finally:
        gc.unfreeze()
        gc.freeze()
