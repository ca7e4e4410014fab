"""What a person touches: the `copus` command. Starts processes and reads run directories; never imports torch."""
