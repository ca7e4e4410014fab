"""Moving state between layouts, from the rank that has it to the rank that needs it. Planning, execution and transport
are apart."""
