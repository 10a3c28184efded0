// Runs a bundle on images: one segment after another, until an exit is sure of enough pixels or the time is up. With regions, each cell of
// the image leaves for itself, and a segment works on the smallest budget that holds the others. Plain Kotlin.
//
// The same decisions as `mess_runtime.runner.Runner` in Python: the exit policy is inside the graph, all that is left to an app is to
// compare numbers.

package org.messtf.example

import kotlin.math.ceil

private const val SURE_ROUNDING = 1e-5 // a sum of as many floats as a cell has pixels

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

    fun readFloats(tensor: T): FloatArray

    fun readBytes(tensor: T): ByteArray

    fun close()
}

/**
 * An executed segment.
 *
 * @property confidence the share of confident pixels, with regions of the cells that are sure; null where neither is known.
 * @property milliseconds until that was known.
 * @property budget with regions, how many cells it worked on; null without.
 * @property active with regions, how many cells had no answer yet; null without.
 */
class Step(val exit: String, val confidence: Double?, val milliseconds: Double, val budget: Int?, val active: Int?)

/** A class per pixel of the image, the exit that made them, and what was run. */
class Result(val mask: ByteArray, val exit: String, val trace: List<Step>) {
    val milliseconds: Double
        get() = trace.map { it.milliseconds }.sum()
}

/** Not thread-safe: one thread at a time. Runs every signature twice before the first image. */
class Runner<T>(val description: Description, private val engine: Engine<T>, private val clock: () -> Long = System::nanoTime) {
    /** A segment at a number of cells, 0 if the image leaves as a whole. */
    private class Form<T>(val budget: Int, val signature: String, val inputs: List<String>, val outputs: Map<String, T>) {
        var fastest = Double.POSITIVE_INFINITY
    }

    /** What a segment made: whether the image leaves, or how many cells have no answer yet; its mask only where it was read. */
    private class Made(val step: Step, val leaves: Boolean, val active: Int, val mask: ByteArray?)

    // Every tensor is made once. Features are handed on where they are.
    private val image: T
    private val forms: List<List<Form<T>>>
    private val latest = HashMap<String, T>() // by name, of the signatures that ran last
    private val pixels = description.height * description.width
    private val cells = description.regions?.cells ?: 0

    /** The least time that all segments together ever took, on the whole image. */
    val fastestMilliseconds: Double
        get() = forms.map { it.last().fastest }.sum()

    init {
        image = engine.input(description.forms(0).values.first(), "image")
        forms = description.exits.indices.map { index ->
            description.forms(index).map { (budget, signature) ->
                val names = description.signatures.getValue(signature)
                Form(budget, signature, names.inputs, names.outputs.associateWith { engine.output(signature, it) })
            }
        }
        repeat(2) { // the first run touches the memory, the second has a typical latency
            write(IntArray(pixels))
            forms.forEachIndexed { index, each ->
                val before = HashMap(latest) // all budgets of a segment read what the segments before it made
                for (form in each) {
                    latest.clear()
                    latest.putAll(before)
                    step(index, form, null, 0)
                }
            }
        }
    }

    /**
     * Segments an image.
     *
     * @param colours 0xAARRGGBB, as Bitmap.getPixels gives them; upright, of any size: it is fitted to the network, and the mask back.
     * @param thresholds by exit the share of confident pixels from which on the image leaves, or with regions a cell, null to go on; by
     *   default the bundle's.
     * @param deadline milliseconds, counted as in the result. A segment that cannot make it even in the least time it ever took is not
     *   started; of one that turns out late the mask does not count. The first exit always counts. With regions, the largest budget that
     *   can make it is taken where the one that holds all cells cannot.
     */
    fun run(
        colours: IntArray,
        height: Int,
        width: Int,
        thresholds: List<Double?> = description.exits.map { it.threshold },
        deadline: Double = Double.POSITIVE_INFINITY
    ): Result {
        require(thresholds.size == forms.size) { "thresholds: must be ${forms.size}, one per exit, got ${thresholds.size}" }
        write(Fit.fit(colours, height, width, description.height, description.width, description.letterbox))
        val trace = ArrayList<Step>()
        var spent = 0.0
        var active = cells
        var exit = description.exits[0].name
        var stands = forms[0].first()
        var read: ByteArray? = null
        for (index in forms.indices) {
            val able = forms[index].filter { index == 0 || spent + it.fastest <= deadline }
            val form = able.firstOrNull { it.budget >= active } ?: able.lastOrNull() ?: break
            val made = step(index, form, thresholds[index], active)
            trace.add(made.step)
            spent += made.step.milliseconds
            if (index > 0 && spent > deadline) break
            exit = made.step.exit
            stands = form
            read = made.mask
            active = made.active
            if (made.leaves) break
        }
        val mask = read ?: engine.readBytes(stands.outputs.getValue("mask"))
        val top = mask.fold(0) { most, value -> maxOf(most, value.toInt() and 0xff) } // of values that are not finite there may be no class
        check(top < description.classes.size) { "the mask of $exit must be of classes 0 to ${description.classes.size - 1}, got $top" }
        val rows = description.height
        val columns = description.width
        val fitted = if (height == rows && width == columns) mask else Fit.maskAt(mask, rows, columns, height, width, description.letterbox)
        return Result(fitted, exit, trace)
    }

    fun close() = engine.close()

    /** Runs a segment. A GPU may still be at work when `run` returns: what is read then waits for it. */
    private fun step(index: Int, form: Form<T>, threshold: Double?, active: Int): Made {
        val inputs = form.inputs.associateWith { latest.getValue(it) }
        val start = clock()
        engine.run(form.signature, inputs, form.outputs)
        val confident = form.outputs["confident_pixels"]?.let { engine.readInt(it) }
        val sure = form.outputs["sure"]?.let { engine.readFloats(it) }
        val mask = if (confident == null && sure == null) engine.readBytes(form.outputs.getValue("mask")) else null
        val milliseconds = (clock() - start) / 1e6
        form.fastest = minOf(form.fastest, milliseconds)
        latest.putAll(form.outputs)
        val unsure = sure?.count { threshold == null || it < (threshold - SURE_ROUNDING).toFloat() } ?: cells
        val confidence = confident?.let { it.toDouble() / pixels } ?: sure?.let { 1 - unsure.toDouble() / cells }
        val enough = threshold != null && confident != null && confident >= ceil(threshold * pixels - 1e-9).toInt()
        val (budget, before) = if (cells == 0) Pair(null, null) else Pair(form.budget, active)
        val step = Step(description.exits[index].name, confidence, milliseconds, budget, before)
        return Made(step, enough || sure != null && unsure == 0, unsure, mask)
    }

    /** Makes an image of the network's size the one that the next steps work on. */
    private fun write(colours: IntArray) {
        latest.clear()
        latest["image"] = image
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
