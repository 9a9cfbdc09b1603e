"""The fields that ask for a form of the answer, in the names of OpenAI, vLLM and FastDeploy. Compiles nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from tern.chat import AnswerForm
from tern.engine import StructuredOutputsParams
from tern.errors import InvalidRequestError, UnsupportedFeatureError
from tern.server.offload import LARGE
from tern.server.schemas.fields import Schema

OBJECT = "an object"
_FALLBACKS = ("disable_fallback", "disable_any_whitespace", "disable_additional_properties")
"""vLLM's switches beside the form: nothing here falls back, the others are not served."""


class StructuredFields(Schema):
    """One form, under whichever name; the same one under several is accepted."""

    response_format: dict[str, Any] | None = Field(None, description=OBJECT)
    structured_outputs: dict[str, Any] | None = Field(None, description=OBJECT)
    guided_json: dict[str, Any] | str | None = Field(None, description="a JSON Schema, an object or JSON text")
    guided_regex: str | None = Field(None, description="text")
    guided_choice: list[Any] | None = Field(None, description="a list of texts")
    guided_grammar: str | None = Field(None, description="text")
    guided_json_object: bool = Field(False, description="true or false")

    def answer_form(self) -> AnswerForm | None:
        """The form that the answer shall have. Raises what is wrong with it, and for two that differ."""
        forms = [form for form in (self._response_form(), self._structured_form(), *self._guided_forms()) if form]
        for other in forms[1:]:
            if (other.kind, other.value) != (forms[0].kind, forms[0].value):
                raise InvalidRequestError(
                    f"{forms[0].place} and {other.place} ask for two forms of the answer: give only one of them.",
                    param=other.place,
                )
        return forms[0] if forms else None

    def _response_form(self) -> AnswerForm | None:
        if self.response_format is None:
            return None
        kind = self.response_format.get("type")
        allowed = {"json_object": ("type",), "json_schema": ("type", "json_schema"), "text": ("type",)}
        if kind == "structural_tag":
            raise UnsupportedFeatureError(
                "response_format.type is 'structural_tag', which is not supported yet: use json_schema.",
                param="response_format",
            )
        if not isinstance(kind, str) or kind not in allowed:
            raise InvalidRequestError(
                f"response_format.type is {kind!r:.40}: it must be one of {', '.join(sorted(allowed))}.",
                param="response_format.type",
            )
        _only("response_format", self.response_format, allowed[kind])
        if kind == "json_schema":
            return _named_schema(self.response_format.get("json_schema"))
        return None if kind == "text" else AnswerForm("json", {"type": "object"}, "response_format")

    def _structured_form(self) -> AnswerForm | None:
        if self.structured_outputs is None:
            return None
        given = {name: value for name, value in self.structured_outputs.items() if value is not None}
        for name in _FALLBACKS:
            if given.get(name) is False or name == "disable_fallback":
                given.pop(name, None)
        names = tuple(StructuredOutputsParams.__dataclass_fields__)
        _only("structured_outputs", given, names)
        return AnswerForm.of(StructuredOutputsParams(**given))

    def _guided_forms(self) -> list[AnswerForm]:
        """Those under vLLM's old names, which FastDeploy has too."""
        forms = []
        for name in StructuredOutputsParams.__dataclass_fields__:
            place = f"guided_{name}"
            value = getattr(self, place)
            if value is None or value is False:
                continue
            try:
                form = AnswerForm.of(StructuredOutputsParams(**{name: value}))
            except InvalidRequestError as error:
                raise InvalidRequestError(
                    str(error).replace(f"structured_outputs.{name}", place), param=place
                ) from None
            assert form is not None
            forms.append(AnswerForm(form.kind, form.value, place))
        return forms


def _named_schema(given: object) -> AnswerForm:
    """OpenAI's `json_schema`; one that is not strict binds all the same, as in vLLM."""
    place = "response_format.json_schema"
    if not isinstance(given, dict):
        raise InvalidRequestError(f"{place} is {given!r:.40}: it must be an object with a schema.", param=place)
    _only(place, given, ("name", "schema", "strict", "description"))
    for name, kind, demand in (("name", str, "text"), ("description", str, "text"), ("strict", bool, "true or false")):
        if given.get(name) is not None and not isinstance(given[name], kind):
            raise InvalidRequestError(
                f"{place}.{name} is {given[name]!r:.40}: it must be {demand}.", param=f"{place}.{name}"
            )
    if given.get("schema") is None:
        raise InvalidRequestError(f"{place}.schema is missing: it must be a JSON Schema.", param=f"{place}.schema")
    return AnswerForm("json", given["schema"], f"{place}.schema")


def _only(place: str, given: dict[str, Any], names: tuple[str, ...]) -> None:
    for name, value in given.items():
        if name not in names and value is not None:
            path = f"{place}.{name[:40]}"
            raise InvalidRequestError(
                f"{path} is not a field of this request: allowed are {', '.join(names)}.",
                param=path,
                code="unknown_field",
            )


def reading_size(fields: Mapping[str, Any], size: int) -> int:
    """How much work a body of `size` bytes is to read: what may need a grammar is not done on the event loop."""
    names = (*StructuredFields.model_fields, "tools", "text", "output_config")  # of every family
    return max(size, LARGE) if any(fields.get(name) for name in names) else size
