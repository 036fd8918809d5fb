"""Other engines and services: not set up, out of credits, or refusing."""

from __future__ import annotations

from sdfleet.doctor.entry import Entry

ENTRIES = (
    Entry(
        id="backend-unavailable",
        title="A backend cannot be used",
        symptoms=("backend_unavailable", "the backend flux-api cannot be used", "no Ollama answers"),
        cause="It was named, and is not installed, has no key, does not answer, or refuses this server's key.",
        cure="curl localhost:7860/api/backends says why of each; leave `backend` out to have it drawn here",
        signs=(
            r"the backend \S+ cannot be used", r"no ollama answers", r"does not draw \(", r"SD_BFL_API_KEY",
            r"not authenticated - invalid authentication",
        ),
        codes=("backend_unavailable", "backend_error"),
    ),
    Entry(
        id="backend-credits",
        title="The service wants to be paid first",
        symptoms=("insufficient_credits", "402 Payment Required", "insufficient_quota", "no credits left"),
        cause="The account of SD_BFL_API_KEY at Black Forest Labs has no credits left. Nothing was charged.",
        cure="buy credits at https://dashboard.bfl.ai, or leave `backend` out to have it drawn here",
        signs=(r"insufficient[_ ](credits|quota)", r"payment required", r"no credits left"),
        codes=("insufficient_credits",),
    ),
    Entry(
        id="backend-failed",
        title="A service or another engine failed",
        symptoms=("backend_failed", "whether it was charged is not known", "was not ready at api.bfl.ai"),
        cause="It met a fault of its own, was too slow, or the connection broke.",
        cure="sdfleet jobs retry ID; what was ordered for money is looked for first and not ordered twice",
        signs=(r"whether it was charged is not known", r"backend_failed", r"was not ready at"),
        codes=("backend_failed",),
    ),
    Entry(
        id="moderated",
        title="A service refuses a prompt or a picture",
        symptoms=("Request Moderated", "Content Moderated", "moderation_blocked"),
        cause="The service judges prompts and pictures by its own rules, which nothing here changes.",
        cure="say it in other words, or have it drawn here: leave `backend` out",
        signs=(r"(request|content) moderated", r"moderation_blocked"),
        codes=("moderated",),
    ),
    Entry(
        id="backend-not-named",
        title="A model is drawn by a service that nobody has named",
        symptoms=("backend_not_named", "is drawn by api.bfl.ai, which would be sent the prompt"),
        cause="A prompt leaves this machine only when somebody has said so; the name of a model alone does not.",
        cure='name it in the request: "backend": "flux-api"; or for all requests: SD_DEFAULT_BACKEND=flux-api',
        signs=(r"which would be sent the prompt", r"backend_not_named"),
        codes=("backend_not_named",),
    ),
)  # fmt: skip
