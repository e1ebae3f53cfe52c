.PHONY: install test style slow docs benchmark

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

docs:
	pip install -c constraints.txt -e ".[docs]"
	sphinx-build -W --keep-going -q docs build/docs

benchmark:
	python benchmarks/targets.py
	python benchmarks/solve.py
	python benchmarks/stats.py
	python benchmarks/evaluate.py
	python benchmarks/fit.py
