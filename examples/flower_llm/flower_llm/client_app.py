"""The ClientApp, as it was written for a synchronous strategy. It knows nothing of AlignFed."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_llm.task import examples, load_model, set_weights, train, weights

app = ClientApp()


@app.train()
def train_adapter(message: Message, context: Context) -> Message:
    """Train on this node's examples, from the weights that were sent."""
    partition = int(context.node_config["partition-id"])
    partitions = int(context.node_config["num-partitions"])
    data = examples(partition, partitions)
    model = load_model()
    set_weights(model, message.content["arrays"].to_torch_state_dict())
    steps = int(message.content["config"]["local-steps"])
    loss = train(model, data, steps)
    content = RecordDict(
        {
            "arrays": ArrayRecord(weights(model)),
            "metrics": MetricRecord({"train_loss": loss, "num-examples": len(data)}),
        }
    )
    return Message(content, reply_to=message)
