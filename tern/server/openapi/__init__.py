"""GET /openapi.json: what the routes take and answer, in OpenAPI 3.1. Knows JSON Schema; answers no request.

A route declares itself with `described`; `document` collects what all of an application's routes declare.
"""

from tern.server.openapi.document import document
from tern.server.openapi.operations import described

__all__ = ["described", "document"]
