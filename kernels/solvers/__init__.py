"""GPTQ: a matrix rounded column by column, each column taking back what the ones before it cost, under a Hessian."""
