"""The plan: schema, strict YAML, presets, selection and resolving. Importable without torch."""
