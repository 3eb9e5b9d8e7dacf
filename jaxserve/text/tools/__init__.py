"""What a reply is made of besides plain text: calls of tools, and reasoning, as models write them.

`formats.py` says which family a model's template speaks; each family has a file. Knows nothing of tokens or
HTTP, nor what a tool does.
"""
