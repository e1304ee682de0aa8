"""Kernels of Jupyter, which run cells as a notebook does."""

import asyncio

import nbformat
from nbclient import NotebookClient


class Kernel:
    """A kernel of Jupyter, and the cells that it has run."""

    def __init__(self, client):
        self._client = client
        self._cells = client.nb.cells

    async def run(self, code):
        """Run a cell, and give what it printed, and the names of the errors that it raised."""
        cell = nbformat.v4.new_code_cell(code)
        self._cells.append(cell)
        await self._client.async_execute_cell(cell, len(self._cells) - 1)
        texts = [output.text for output in cell.outputs if output.output_type == "stream"]
        errors = [output.ename for output in cell.outputs if output.output_type == "error"]
        return "".join(texts), errors

    async def stop(self, code):
        """Run a cell, press the stop button once it has printed, and give the same as `run`."""
        before = len(self._cells)
        running = asyncio.ensure_future(self.run(code))
        while not any(cell.outputs for cell in self._cells[before:]):  # noqa: ASYNC110  # no hook
            await asyncio.sleep(0.01)
        await self._client.km.interrupt_kernel()
        return await running


def in_kernel(main):
    """Run an async function with a kernel of its own."""

    async def run():
        notebook = nbformat.v4.new_notebook()
        client = NotebookClient(notebook, kernel_name="python3", allow_errors=True)
        async with client.async_setup_kernel():
            await main(Kernel(client))

    asyncio.run(run())
