.PHONY: install test style slow benchmark

install:
	pip install -c constraints.txt -e ".[test]"

style:
	ruff check .
	ruff format --check .
	mypy

test: style
	python -m pytest

slow:
	python -m pytest -m slow

benchmark:
	python benchmarks/atlas.py
