// All kernels of an instruction set as one object, included last by each in its namespace. A constant expression:
// nothing of an instruction set may run before the processor has been asked for it.

constexpr Kernels kernel_table(const char* name, const char* description) {
    return {name, description, runs_on, quantise_row, quantise_head, quantise_finely, multiply, silu_mul, add_scaled, widen,
            narrow, dot, inverse_norm, rotate, exponentials, largest, weights, attend_tile, join, read, peak, pack_panel};
}
