"""The coordinator behind Flower: words on the wire, the device's side, the server's side."""
