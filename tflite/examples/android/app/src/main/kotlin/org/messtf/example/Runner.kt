// Runs a bundle on images: one segment after another, until an exit is sure of enough pixels or the time is up. Plain Kotlin.
//
// The same decisions as `mess_runtime.runner.Runner` in Python: the exit policy is inside the graph, all that is left to an app is to
// compare a number.

package org.messtf.example

import kotlin.math.ceil

/** What runs the signatures of a model. `T` is a tensor where the engine holds it: what one signature makes, another reads there. */
interface Engine<T> {
    /** A tensor for an input of a signature. */
    fun input(signature: String, name: String): T

    /** A tensor for an output of a signature. */
    fun output(signature: String, name: String): T

    fun run(signature: String, inputs: Map<String, T>, outputs: Map<String, T>)

    fun write(tensor: T, bytes: ByteArray)

    fun write(tensor: T, floats: FloatArray)

    fun readInt(tensor: T): Int

    fun readBytes(tensor: T): ByteArray

    fun close()
}

/** An executed segment: its exit, the share of confident pixels where they are counted, and the time until that was known. */
class Step(val exit: String, val confidence: Double?, val milliseconds: Double)

/** A class per pixel of the image, the exit that made them, and what was run. */
class Result(val mask: ByteArray, val exit: String, val trace: List<Step>) {
    val milliseconds: Double
        get() = trace.map { it.milliseconds }.sum()
}

/** Not thread-safe: one thread at a time. Runs every segment twice before the first image. */
class Runner<T>(val description: Description, private val engine: Engine<T>, private val clock: () -> Long = System::nanoTime) {
    private class Segment<T>(val signature: String, val inputs: Map<String, T>, val outputs: Map<String, T>)

    /** What a segment made, its mask only where it was read. */
    private class Made(val step: Step, val confident: Int?, val mask: ByteArray?)

    // Every tensor is made once. Features are handed on where they are.
    private val image: T
    private val segments: List<Segment<T>>
    private val pixels = description.height * description.width
    private val fastest = DoubleArray(description.exits.size) { Double.POSITIVE_INFINITY }

    /** The least time that all segments together ever took. */
    val fastestMilliseconds: Double
        get() = fastest.sum()

    init {
        val first = "segment.${description.exits[0].name}"
        image = engine.input(first, "image")
        val tensors = hashMapOf("image" to image)
        segments = description.exits.map { exit ->
            val signature = "segment.${exit.name}"
            val names = description.signatures.getValue(exit.name)
            val inputs = names.inputs.associateWith { tensors.getValue(it) }
            val outputs = names.outputs.associateWith { engine.output(signature, it) }
            tensors.putAll(outputs)
            Segment(signature, inputs, outputs)
        }
        repeat(2) { // the first run touches the memory, the second has a typical latency
            write(IntArray(pixels))
            for (index in segments.indices) step(index)
        }
    }

    /**
     * Segments an image.
     *
     * @param colours 0xAARRGGBB, as Bitmap.getPixels gives them; upright, of any size: it is fitted to the network, and the mask back.
     * @param thresholds by exit the share of confident pixels from which on the image leaves, null to go on; by default the bundle's.
     * @param deadline milliseconds, counted as in the result. A segment that cannot make it even in the least time it ever took is not
     *   started; of one that turns out late the mask does not count. The first exit always counts.
     */
    fun run(
        colours: IntArray,
        height: Int,
        width: Int,
        thresholds: List<Double?> = description.exits.map { it.threshold },
        deadline: Double = Double.POSITIVE_INFINITY
    ): Result {
        require(thresholds.size == segments.size) { "thresholds: must be ${segments.size}, one per exit, got ${thresholds.size}" }
        write(Fit.fit(colours, height, width, description.height, description.width, description.letterbox))
        val trace = ArrayList<Step>()
        var spent = 0.0
        var stands = 0
        var read: ByteArray? = null
        for (index in segments.indices) {
            if (index > 0 && spent + fastest[index] > deadline) break
            val made = step(index)
            trace.add(made.step)
            spent += made.step.milliseconds
            if (index > 0 && spent > deadline) break
            stands = index
            read = made.mask
            val threshold = thresholds[index]
            if (threshold != null && made.confident != null && made.confident >= ceil(threshold * pixels - 1e-9).toInt()) break
        }
        val mask = read ?: engine.readBytes(segments[stands].outputs.getValue("mask"))
        val rows = description.height
        val columns = description.width
        val fitted = if (height == rows && width == columns) mask else Fit.maskAt(mask, rows, columns, height, width, description.letterbox)
        return Result(fitted, description.exits[stands].name, trace)
    }

    fun close() = engine.close()

    /** Runs a segment. A GPU may still be at work when `run` returns: what is read then waits for it. */
    private fun step(index: Int): Made {
        val segment = segments[index]
        val count = segment.outputs["confident_pixels"]
        val start = clock()
        engine.run(segment.signature, segment.inputs, segment.outputs)
        val confident = if (count == null) null else engine.readInt(count)
        val mask = if (count == null) engine.readBytes(segment.outputs.getValue("mask")) else null
        val milliseconds = (clock() - start) / 1e6
        if (milliseconds < fastest[index]) fastest[index] = milliseconds
        return Made(Step(description.exits[index].name, confident?.let { it.toDouble() / pixels }, milliseconds), confident, mask)
    }

    private fun write(colours: IntArray) {
        if (description.takesBytes) {
            val bytes = ByteArray(3 * pixels)
            for (pixel in 0 until pixels) for (c in 0..2) bytes[3 * pixel + c] = (colours[pixel] shr (16 - 8 * c)).toByte()
            engine.write(image, bytes)
        } else {
            val floats = FloatArray(3 * pixels)
            for (pixel in 0 until pixels) for (c in 0..2) floats[3 * pixel + c] = (colours[pixel] shr (16 - 8 * c) and 0xff).toFloat()
            engine.write(image, floats)
        }
    }
}
