// Two loops that are one after another by nature, for native.py. Their numpy forms, equal to the last bit, stand in
// gpt_indices.py and blending.py.

#include <cstdint>
#include <vector>

// Row k of `index` [rows + 1, 2]: where sample k begins, as (place in order, offset). See gpt_indices.py.
template <typename Int>
static void sample_index(const int32_t* sizes, const int32_t* order, int64_t documents, int64_t seq, int64_t extra, int64_t rows,
                         Int* index) {
    int64_t place = 0, begin = 0, end = sizes[order[0]];  // of the document at `place`, in the long text
    index[0] = index[1] = 0;
    for (int64_t row = 1; row <= rows; ++row) {
        const int64_t last = row * seq + extra - 1;  // the last token of the row before
        while (end <= last && place + 1 < documents) {
            begin = end;
            end += sizes[order[++place]];
        }
        int64_t offset = last - begin + 1 - extra;
        if (end <= last) {  // a last sample that is not full
            offset = sizes[order[place]] - extra;
            offset = offset < 0 ? 0 : offset;
        }
        index[2 * row] = Int(place);
        index[2 * row + 1] = Int(offset);
    }
}

// The loop in the head of blending.py. limits: how many samples each data set has, where that counts.
template <bool limited>
static void interleave(const double* weights, int64_t sets, const int64_t* limits, int64_t size, int16_t* number,
                       int64_t* sample) {
    const double never = -1.0 / 0.0;
    std::vector<double> counts(sets, 0.0);
    double* const count = counts.data();
    for (int64_t t = 0; t < size; ++t) {
        const double now = double(t ? t : 1);
        const auto lag = [&](int64_t i) {
            return limited && count[i] == double(limits[i]) ? never : now * weights[i] - count[i];
        };
        double most = lag(0);
        int64_t chosen = 0;
        for (int64_t i = 1; i < sets; ++i) {
            const double here = lag(i);
            chosen = here > most ? i : chosen;
            most = here > most ? here : most;
        }
        number[t] = int16_t(chosen);
        sample[t] = int64_t(count[chosen]);
        count[chosen] += 1.0;
    }
}

extern "C" {
void sample_index_int32(const int32_t* sizes, const int32_t* order, int64_t documents, int64_t seq, int64_t extra, int64_t rows,
                        int32_t* index) {
    sample_index(sizes, order, documents, seq, extra, rows, index);
}
void sample_index_int64(const int32_t* sizes, const int32_t* order, int64_t documents, int64_t seq, int64_t extra, int64_t rows,
                        int64_t* index) {
    sample_index(sizes, order, documents, seq, extra, rows, index);
}
void blend(const double* weights, int64_t sets, const int64_t* limits, int64_t size, int16_t* number, int64_t* sample) {
    limits ? interleave<true>(weights, sets, limits, size, number, sample)
           : interleave<false>(weights, sets, nullptr, size, number, sample);
}
}
