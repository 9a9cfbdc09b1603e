"""Behind the offline door: prompts on their way, their outputs, and a bar that shows how far they are.

Knows the engine's requests and the text protocol; knows no model and no HTTP, and runs nothing. `tern.llm` does.
"""
