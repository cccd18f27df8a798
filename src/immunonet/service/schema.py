"""What the service says of itself in OpenAPI: bodies, answers, errors, with an example each."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

ABOUT = (
    "A trained classifier behind a defence. Ask about images or arrays; with a memory, say what they really were. "
    'Errors are {"detail": why}.'
)
_RESULT: dict[str, Any] = {
    "id": ("string", "By which feedback names it; with a memory, that of its entry."),
    "label": ("integer", "The label, a number."),
    "class": ("string", "Its name."),
    "votes": ({"type": "array", "items": {"type": "number"}}, "Share of each label; they sum to 1."),
    "credibility": ("number", "Conformal p-value: how well what is known supports the label."),
    "foreign": ("boolean", "Whether it looks unlike what is known."),
    "innate": ("boolean", "Whether the network answered by itself."),
    "recalled": ("boolean", "Whether it was answered from memory."),
    "suspicious": ("boolean", "Whether it looks like one of many near copies."),
}
_ALWAYS = ("id", "label", "class")
_EXAMPLE = {
    "id": "2f6c", "label": 1, "class": "one", "votes": [0.0, 1.0], "credibility": 0.93, "foreign": False,
    "innate": None, "recalled": False, "suspicious": False,
}  # fmt: skip
_ERRORS = {
    "401": "No token, or one that is not known.", "403": "A token of another role, or a query that is refused.",
    "404": "The service has no memory.", "408": "The body came too slowly.", "409": "A folder that cannot be served.",
    "413": "Too large.", "415": "Another content type.", "422": "Not what can be asked about.",
    "429": "Too many inputs wait.", "503": "Not ready, or stopping.", "504": "No answer in time.",
}  # fmt: skip


def _object(example: dict[str, Any], **properties: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {"type": "object", "properties": properties, "required": list(properties)}
    return known | {"additionalProperties": False, "example": example}


def _results() -> dict[str, Any]:
    kinds = {name: kind if isinstance(kind, dict) else {"type": kind} for name, (kind, _) in _RESULT.items()}
    row = {
        name: (kind if name in _ALWAYS else {"anyOf": [kind, {"type": "null"}]}) | {"description": _RESULT[name][1]}
        for name, kind in kinds.items()
    }
    return _object({"results": [_EXAMPLE]}, results={"type": "array", "items": _object(_EXAMPLE, **row)})


_TEXT = {"type": "string"}
_WHOLE = {"type": "integer"}
_INPUTS = _object({"inputs": [[0.0, 0.5, 1.0]]}, inputs={"type": "array", "items": {"type": "array"}, "minItems": 1})
_VERSION = {"anyOf": [{"type": "integer", "minimum": 0}, _TEXT]}
_AFTER: dict[str, Any] = _object({"version": 7, "entries": 120}, version=_WHOLE, entries=_WHOLE)
_STATUS = _object({"status": "ready"}, status=_TEXT)

# Body, answer, and errors by route.
_ROUTES: dict[tuple[str, str], tuple[str, dict[str, Any] | None, dict[str, Any], tuple[str, ...]]] = {
    ("post", "/v1/respond"): (
        "Ask about an image (PNG or JPEG), or about inputs as JSON.", _INPUTS, _results(),
        ("401", "403", "408", "413", "415", "422", "429", "503", "504"),
    ),
    ("post", "/v1/feedback"): (
        "Say what an input really was (role confirm).",
        _object({"id": "2f6c", "label": 1}, id=_TEXT, label={"type": "integer", "minimum": 0}),
        _object({"id": "2f6c", "label": 1}, id=_TEXT, label=_WHOLE), ("401", "403", "404", "408", "413", "422"),
    ),
    ("get", "/v1/memory"): ("What the memory holds (role confirm).", None, {"type": "object"}, ("401", "403", "404")),
    ("post", "/v1/memory/rollback"): (
        "Bring back a version of the memory (role admin).", _object({"version": 3}, version=_VERSION), _AFTER,
        ("401", "403", "404", "408", "413", "422"),
    ),
    ("post", "/v1/memory/forget"): (
        "Forget all entries of a source (role admin).", _object({"source": "caller"}, source=_TEXT),
        _object({"forgotten": 2, "version": 8, "entries": 118}, forgotten=_WHOLE, version=_WHOLE, entries=_WHOLE),
        ("401", "403", "404", "408", "413", "422"),
    ),
    ("post", "/v1/reload"): (
        "Read the defence's folder again (role admin).", None, _object({"defence": "rails"}, defence=_TEXT),
        ("401", "403", "409", "503"),
    ),
    ("get", "/healthz"): ("Whether the service is alive.", None, _STATUS, ()),
    ("get", "/readyz"): ("Whether it answers.", None, _STATUS, ("503",)),
}  # fmt: skip


def openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of an application, made once."""
    if app.openapi_schema:
        return app.openapi_schema
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    failed = {"application/json": {"schema": _object({"detail": "why"}, detail=_TEXT)}}
    found["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
    for (method, path), (about, body, answer, errors) in _ROUTES.items():
        operation: dict[str, Any] = {
            "summary": about, "operationId": path.strip("/").replace("/", "_"),
            "responses": {
                "200": {"description": "Done.", "content": {"application/json": {"schema": answer}}},
                **{code: {"description": _ERRORS[code], "content": failed} for code in errors},
            },
        }  # fmt: skip
        if "401" in errors:
            operation["security"] = [{"token": []}, {}]
        if body is not None:
            kinds: dict[str, Any] = {"application/json": {"schema": body}}
            if path == "/v1/respond":
                picture = {"schema": {"type": "string", "format": "binary"}}
                kinds |= {"image/png": picture, "image/jpeg": picture}
                about_source = {"type": "string", "maxLength": 200, "pattern": "^[!-~]*$"}
                operation["parameters"] = [
                    {"name": "X-Source", "in": "header", "required": False, "schema": about_source}
                ]
            operation["requestBody"] = {"required": True, "content": kinds}
        found["paths"][path][method] = operation
    app.openapi_schema = found
    return found
