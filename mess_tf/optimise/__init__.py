"""The search: costs and the definition of a configuration, the optimum and its proof, guarantees. Never imports TensorFlow."""
