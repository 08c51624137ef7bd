"""The engine over interactive training in Microsoft Foundry, by its fine-tuning sessions."""
