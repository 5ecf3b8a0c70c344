"""longspan: context-parallel training of transformers at lengths that no single device holds.

Start at the package whose name says what you want to do. Imports point one way, back along this list:
hardware, layout, attention, mixers, context, model, plan, train, compress, serve, tasks, bench, cli.
Nothing is imported here, so that `import longspan` costs nothing.
"""

__version__ = "0.1.0"
