"""Files of many requests in OpenAI's batch format, answered by the application in this process.

Knows JSON lines, files and ASGI; knows no route and no socket.
"""

from tern.server.batch.answers import AnswerFile
from tern.server.batch.lines import read_lines
from tern.server.batch.run import Tally, batch_urls, run_batch

__all__ = ["AnswerFile", "Tally", "batch_urls", "read_lines", "run_batch"]
