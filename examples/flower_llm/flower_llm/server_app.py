"""The ServerApp: federated averaging of LoRA weights."""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flower_llm.task import evaluate, examples, load_model, set_weights, weights

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and print the loss of every round."""
    model, data = load_model(), examples(None)

    def score(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_weights(model, arrays.to_torch_state_dict())
        loss = evaluate(model, data)
        print(f"round {server_round}: evaluation loss {loss:.4f}", flush=True)
        return MetricRecord({"loss": loss})

    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=2)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(weights(model)),
        num_rounds=int(context.run_config.get("num-rounds", 6)),
        train_config=ConfigRecord({"local-steps": int(context.run_config.get("local-steps", 10))}),
        evaluate_fn=score,
    )
