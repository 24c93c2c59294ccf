"""A model hub for the operator: the models that this machine has, and beyond them the real one."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web


async def start_hub(mirror: Path | None, elsewhere: str | None) -> web.AppRunner:
    """Serve `config.json` of models on a free port of 127.0.0.1; the address is in `runner.addresses`.

    Args:
        mirror: folder with `<organisation>/<name>` folders.
        elsewhere: address of a hub to send others to; None where there is no way to one.
    """

    async def config(request: web.Request) -> web.StreamResponse:
        organisation, name = request.match_info["organisation"], request.match_info["name"]
        path = None if mirror is None else mirror / organisation / name / "config.json"
        # Names with dots only would leave the folder.
        if path is not None and organisation.strip(".") and name.strip(".") and path.is_file():
            return web.FileResponse(path)
        if elsewhere is None:
            raise web.HTTPServiceUnavailable(text="this machine does not have the model, and is offline\n")
        raise web.HTTPTemporaryRedirect(f"{elsewhere.rstrip('/')}{request.path_qs}")

    app = web.Application()
    app.router.add_get("/{organisation}/{name}/resolve/{revision}/config.json", config)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner
