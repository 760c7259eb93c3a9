"""An OpenAI-compatible server, files along a request's path.

`settings` limits · `guard` keys and metrics of every request, with `access` its line in
the log · `body` bytes · `schema` fields · `images` data URLs and,
if allowed, `fetch` · `engine` the interface · `choose` method and budget · `prepare` model inputs · `counting` token
counts · `worker` queue and batches · `batch` one batch, with `row` for each answer · `progress` the way back to the
client · `responses` and `stream` JSON and events · `app` routes · `run` the process.

`vllm_command` is the command line of vLLM's server, `vllm_process` starts and watches it, and `vllm_child` runs it.
"""
