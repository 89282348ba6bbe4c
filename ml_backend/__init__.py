"""The Label Studio side: protocol, images, engine, commands."""
