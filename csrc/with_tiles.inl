// The kernels that tile registers do better, in the place of the vectors'; included last, by AMX and its emulation.

constexpr Kernels with_tiles(Kernels table) {
    table.multiply = multiply_many;
    table.peak = peak_of_tiles;
    table.attend_tile = attend_in_tiles;
    return table;
}
