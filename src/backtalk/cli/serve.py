"""`backtalk serve`: a policy behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from backtalk.cli.interrupts import Interrupted, run
from backtalk.cli.options import OptionalRunFolder, Settings, policy_settings


def serve(
    folder: OptionalRunFolder = None,
    model: Annotated[str | None, typer.Option(help="Serve this model instead of a run's.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Serve the model that the run began with.")] = False,
    host: Annotated[str, typer.Option(help="Address; the default is reached from this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    settings: Settings = None,
) -> None:
    """Let agents that others wrote act with a policy: POST /v1/chat/completions, as OpenAI's and vLLM's.

    Replies carry prompt_token_ids, token_ids and logprobs. There is no key and no encryption: keep it on this machine.
    Example: `backtalk serve runs/mine`, then give an agent http://127.0.0.1:8000/v1 and any key.
    """
    config, checkpoint = policy_settings(folder, model, base, list(settings or []))
    from backtalk.engines.choose import open_engine
    from backtalk.language.renderer import Renderer
    from backtalk.run.history import fit_history
    from backtalk.run.serve import Endpoint, listen
    from backtalk.run.serve import serve as serve_forever

    with listen(host, port) as listener:  # before a model is loaded, which may take minutes
        config = fit_history(config, lambda text: typer.echo(f"note: {text}", err=True))
        engine = open_engine(config.engine, seed=config.seed)
        if checkpoint is not None:
            engine.load(checkpoint)
        endpoint = Endpoint(
            Renderer(engine.tokenizer, (), config.renderer),
            engine.sampler,
            config.sampling_params,
            max_tokens=config.rollout.max_tokens,
        )
        policy = model or (f"the model that {folder} began with" if base else folder)
        place = f"[{host}]" if ":" in host else host
        typer.echo(f"Serving {policy} at http://{place}:{port}/v1; Ctrl-C ends it.", err=True)
        try:
            run(serve_forever(endpoint, listener))
        except Interrupted:
            typer.echo("Ended.", err=True)
